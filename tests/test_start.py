"""The student's start: weights that are cut out of those of a larger model of the same family."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import timm
import torch
from conftest import RESNET, block_output, make_batch, make_vit, world_config
from safetensors.torch import save_file

from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.checks import check_command
from pipeline.config import StudentConfig, load_config
from pipeline.data import ImageFile, relocate
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.loading import load_model, load_saved
from pipeline.runtime.devices import make_accelerator
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.students.start import TeacherWeights, start_student
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from singer.errors import UserError
from singer.projectors import PROJECTORS, ProjectorSpec
from singer.selection import chosen_blocks, even, misfit, select_weights

CPU = torch.device("cpu")


def loaded(model: torch.nn.Module, source: torch.nn.Module) -> torch.nn.Module:
    model.load_state_dict(select_weights(source, model))
    return model.eval()


def test_which_blocks_and_channels() -> None:
    assert even(192, 96).tolist() == list(range(0, 192, 2)) and even(3, 2).tolist() == [0, 1]
    assert chosen_blocks(12, 4, "first") == [0, 1, 2, 3] and chosen_blocks(12, 4, "even") == [2, 5, 8, 11]


def test_a_student_of_the_same_shape_is_the_teacher() -> None:
    """Fewer blocks change nothing before them; a student without LayerScale computes what the teacher did with it."""
    teacher, student = make_vit(), make_vit(seed=1, depth=3, num_classes=0)
    assert torch.equal(block_output(loaded(student.model, teacher.model), 2), block_output(teacher.model, 2))
    scaled = make_vit(init_values=0.3)
    torch.testing.assert_close(block_output(loaded(student.model, scaled.model), 2), block_output(scaled.model, 2))


def test_channels_are_chosen_head_by_head() -> None:
    """A teacher that uses only the channels and heads that are chosen gives just these as the student's output."""
    teacher = make_vit(num_heads=4, mlp_ratio=4).model
    student = make_vit(seed=1, embed_dim=12, num_heads=2, mlp_ratio=2, num_classes=0).model
    kept, zero = even(24, 12), torch.ones(24, dtype=torch.bool)
    zero[kept] = False
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if p.shape[0] == 24 and "qkv" not in name:
                p[zero] = 0  # what writes to the residual stream
            elif name in ("pos_embed", "cls_token"):
                p[..., zero] = 0
    chosen = loaded(student, teacher)
    block, larger = chosen.blocks[1], teacher.blocks[1]  # type: ignore[index]
    # Heads 0 and 2 of four, each with all of its six channels.
    heads = [*range(6), *range(12, 18)]
    rows = heads + [24 + n for n in heads] + [48 + n for n in heads]
    assert torch.equal(block.attn.qkv.weight, larger.attn.qkv.weight[rows][:, kept])
    assert torch.equal(block.attn.proj.weight, larger.attn.proj.weight[kept][:, heads])
    assert torch.equal(block.mlp.fc1.weight, larger.mlp.fc1.weight[even(96, 24)][:, kept])
    assert torch.equal(chosen.pos_embed, teacher.pos_embed[..., kept])


def test_other_patches_positions_and_normalisation(world: Path, tmp_path: Path) -> None:
    """A finer grid gets interpolated positions, and images with another mean and std give the same tokens."""
    teacher = make_vit()
    finer = make_vit(seed=1, patch_size=4).model
    state = select_weights(teacher.model, finer)
    assert state["patch_embed.proj.weight"].shape == (24, 3, 4, 4) and state["pos_embed"].shape == (1, 65, 24)
    assert not torch.equal(state["pos_embed"], finer.pos_embed)
    same = Backbone(make_vit(seed=2).model, *list(vars(teacher).values())[1:4], (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "t")
    start_student(same, StudentConfig(init=str(tmp_path / "t")), _weights(world))
    images = torch.rand(2, 3, 32, 32)
    ours, theirs = (
        b.model.eval()((images - torch.tensor(b.mean).view(3, 1, 1)) / torch.tensor(b.std).view(3, 1, 1))
        for b in (same, load_saved(tmp_path / "t"))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_small_patch14_dinov2"])
def test_families(name: str) -> None:
    args = {"embed_dim": 48, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 0}
    teacher, student = timm.create_model(name, **args), timm.create_model(name, **args | {"depth": 2})
    assert misfit(teacher, student) is None
    assert torch.equal(block_output(loaded(student, teacher), 1), block_output(teacher.eval(), 1))


def test_misfits() -> None:
    teacher = make_vit().model
    assert misfit(teacher, make_vit(depth=5).model) == "it has 4 blocks and the student 5"
    assert misfit(teacher, make_vit(embed_dim=48).model) == "it has 24 channels and the student 48"
    assert "no list of transformer blocks" in str(misfit(teacher, timm.create_model("test_resnet")))
    for name, family in (("cait_xxs24_224", "Cait"), ("xcit_nano_12_p16_224", "Xcit"), ("mixer_s32_224", "MlpMixer")):
        with torch.device("meta"):
            other = timm.create_model(name)
        assert misfit(teacher, other) == f"it is a VisionTransformer and the student a {family}"
        assert misfit(other, other) == f"no weights are cut out of a {family}"
    swiglu = timm.create_model("vit_giant_patch14_dinov2", embed_dim=24, depth=2, num_heads=2)
    assert "hidden units" in str(misfit(swiglu, make_vit(embed_dim=12, depth=2).model))
    turning = {"depth": 2, "num_classes": 0, "num_heads": 2}
    pair = [timm.create_model("vit_small_patch16_dinov3", embed_dim=d, **turning) for d in (48, 24)]
    assert "turn in pairs" in str(misfit(*pair))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 2},
        {"patch_size": 4, "image_size": 16},
        {"depth": 2},
        {"exit": "wide", "exit_width": 48},
        {"image_size": (32, 48)},
    ],
)
def test_start_from_a_file(changes: dict[str, Any], world: Path, tmp_path: Path) -> None:
    """Published weights have a head, and may have another depth, patch size or number of registers."""
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2, "reg_tokens": 1, "img_size": 64}
    source = timm.create_model("vit_tiny_patch16_224", patch_size=8, num_classes=7, **sizes)
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    config = StudentConfig(**{"dim": 24, "depth": 4, "heads": 2, "patch_size": 8, "registers": 1} | changes)
    student = new_student(config, 32)
    start_student(student, config.model_copy(update={"init": str(tmp_path / "own.safetensors")}), _weights(world))
    # What the file does not have keeps its value in both.
    torch.testing.assert_close(dict(student.model.state_dict()), select_weights(source, student.model))
    name = "blocks.0.mlp.fc2.weight"
    assert torch.equal(student.model.state_dict()[name], source.state_dict()[name])


def test_start_from_a_wrapped_file_of_another_depth(world: Path, tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", depth=5, num_heads=2, embed_dim=24, patch_size=8, img_size=32)
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"teacher": wrapped, "epoch": 3}, tmp_path / "dino.pth")
    config = StudentConfig(dim=24, depth=2, heads=2, patch_size=8, init=str(tmp_path / "dino.pth"))
    student = new_student(config, 32)
    start_student(student, config, _weights(world))
    torch.testing.assert_close(dict(student.model.state_dict()), select_weights(source, student.model))
    assert torch.equal(student.model.state_dict()["cls_token"], source.state_dict()["cls_token"])


def test_a_file_for_a_student_without_a_list_of_blocks(world: Path, tmp_path: Path) -> None:
    """Why it cannot start is said before the file's model is built, which needs not have the same arguments."""
    student = new_student(StudentConfig(name="hiera_tiny_224", image_size=224), 224)
    save_file(student.model.state_dict(), tmp_path / "own.safetensors")
    config = StudentConfig(name="hiera_tiny_224", init=str(tmp_path / "own.safetensors"))
    with pytest.raises(UserError, match="no weights are cut out of a Hiera; or start from random weights"):
        start_student(student, config, _weights(world))


def test_a_file_of_another_width_needs_its_folder(world: Path, tmp_path: Path) -> None:
    """Only config.json says in how many heads a wider model is divided; a file in its folder has it beside."""
    config = StudentConfig(dim=24, depth=2, heads=2, patch_size=8)
    for width, message in (
        (48, "has 48 channels and the student 24, and a file does not say in how many heads; name the folder of its"),
        (12, "has 12 channels and the student 24; or start from random weights"),
    ):
        source = make_vit(embed_dim=width, depth=3, num_heads=4)
        save_backbone(source, source.model.state_dict(), tmp_path / "model")
        (tmp_path / "alone.safetensors").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
        with pytest.raises(UserError, match=message):
            start(config, tmp_path / "alone.safetensors", world)
        for path in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
            if width == 48:
                student = start(config, path, world)
                torch.testing.assert_close(
                    dict(student.model.state_dict()), select_weights(source.model, student.model)
                )


@pytest.mark.parametrize("kind", ["lift", "wide"])
def test_weights_of_a_student_with_an_exit(kind: str, world: Path, tmp_path: Path) -> None:
    """They are a start as a folder and as a file, for students with an exit and without; others want the folder."""
    plain = StudentConfig(dim=24, depth=3, heads=2, patch_size=8)
    config = plain.model_copy(update={"exit": kind, "exit_width": 48})
    source = new_student(config, 32)
    save_backbone(source, source.model.state_dict(), tmp_path / "model")
    alone, folder = tmp_path / "alone.safetensors", tmp_path / "model"
    alone.write_bytes((folder / "model.safetensors").read_bytes())
    for path in (alone, folder, folder / "model.safetensors"):
        again = start(config, path, world).model.state_dict()
        torch.testing.assert_close(dict(again), dict(source.model.state_dict()))
        body = start(plain, path, world).model.state_dict()
        assert torch.equal(body["blocks.1.mlp.fc1.weight"], again["blocks.1.mlp.fc1.weight"])
    for weights in (alone, folder / "model.safetensors"):
        remedy = "a student that has an exit is named by its folder, with its config.json: local-dir:RUN/student"
        with pytest.raises(UserError, match=f"{weights} are those of student.exit {kind}; {remedy}"):
            load_model("vit_tiny_patch16_224", weights)
        with pytest.raises(UserError, match=f"model vit_exit: {remedy}"):
            load_model("vit_exit", weights)
    assert load_model(f"local-dir:{folder}").width == 48


def start(config: StudentConfig, init: Path, world: Path) -> Backbone:
    student = new_student(config, 32)
    start_student(student, config.model_copy(update={"init": str(init)}), _weights(world))
    return student


def _weights(world: Path, **changes: object) -> TeacherWeights:
    cache = Cache(world / "cache")
    t = cache.manifest.teacher
    return TeacherWeights(cache.teacher_config(), t.architecture, t.model_args, str(changes.get("digest", t.weights)))


def test_start_from_the_cached_teacher(world: Path, tmp_path: Path) -> None:
    """The run says it, starts at a lower loss than by chance, and another run starts from it."""
    teacher = load_saved(world / "teacher")
    for init in ("auto", "teacher"):
        student = new_student(world_config(world, "student.dim=24", "student.heads=2").student, 32)
        start_student(student, StudentConfig(init=init), _weights(world))
        assert torch.equal(block_output(student.model.eval(), 2), block_output(teacher.model, 2))
    config = world_config(world, "student.init=teacher", "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    again = new_student(config.student, 32)
    start_student(again, StudentConfig(init=str(tmp_path / "run")), _weights(world))
    trained = load_saved(tmp_path / "run" / "student")
    assert torch.equal(block_output(again.model.eval(), 2), block_output(trained.model, 2))
    start_student(again, StudentConfig(init=str(tmp_path / "run/student/model.safetensors")), _weights(world))
    assert torch.equal(block_output(again.model.eval(), 2), block_output(trained.model, 2))


WHOLE = ["student.dim=24", "student.init=auto"]  # as wide as the teacher, which has four blocks


@pytest.mark.parametrize(
    ("sets", "decay"),
    [
        (WHOLE, 0.7),
        ([*WHOLE, "student.depth=2"], 0.7),
        ([*WHOLE, "student.init=teacher", "student.patch_size=4", "student.exit=wide"], 0.7),
        ([*WHOLE, "distill.layer_decay=0.9"], 0.9),
        ([*WHOLE, "distill.layer_decay=1"], 1.0),
        ([*WHOLE, "student.depth=4"], 1.0),  # a copy
        ([*WHOLE, "student.init=random"], 1.0),
        ([*WHOLE, "student.mlp_ratio=2"], 1.0),  # with every second hidden unit
        ([*WHOLE, "distill.trained=[blocks.2]"], 1.0),
        ([*WHOLE, "student.lora=2"], 1.0),
        (["student.init=teacher"], 1.0),  # with every second channel
        (RESNET, 1.0),
    ],
)
def test_the_layer_decay_of_students_that_start_as_blocks_of_the_teacher(
    sets: list[str], decay: float, world: Path, tmp_path: Path
) -> None:
    """The rate of the first block is that factor of the second one's; the run says it if nobody asked for it."""
    config = world_config(world, *sets)
    sources, accelerator = open_teachers(config.distill, world / "cache", None), make_accelerator("no")
    new = NewStudent(StudentSpec(config, tmp_path / "run"), sources, accelerator)
    assert new.layer_decay == pytest.approx(decay)
    (tmp_path / "run").mkdir()
    groups = new.student_run("new", accelerator).optimiser.param_groups
    named = {id(p): name for name, p in new.student.model.named_parameters()}
    scales = {named[id(p)]: group.get("lr_scale", 1.0) for group in groups for p in group["params"] if id(p) in named}
    if (name := "blocks.0.attn.qkv.weight") in scales:
        assert scales[name] / scales[name.replace("0", "1")] == pytest.approx(decay)
    assert any("distill.layer_decay" in line for line in new.matched()) == (decay == 0.7)


def test_a_copy_of_the_teacher_learns_from_half_of_its_patches(world: Path, tmp_path: Path) -> None:
    """It begins at the targets but for the codec's rounding, so that nothing but the missing patches costs."""
    sets = ["student.dim=24", "student.depth=4", "student.init=teacher", "distill.projector=none"]
    more = ["distill.token_share=0.5", "distill.epochs=6", "distill.whole_share=0", "distill.lr=2e-5"]
    config, cache = world_config(world, *sets, *more), Cache(world / "cache")
    student = new_student(config.student, 32)
    start_student(student, config.student, _weights(world))
    with pytest.raises(UserError, match="the student has 24 channels where its teacher has 25; take another one"):
        PROJECTORS["none"].of_blocks({3: ProjectorSpec((24,), 25, 1)})
    branch = TeacherBranch(
        student, {2: 2, 3: 3}, Targets(cache, None, student, CPU), Teaching({"mse": 1.0}, projector="none")
    )
    with ImageFile(relocate(cache.index.images, None)) as files:
        pixels = cache.pixels(range(8), 32, files)
    features = Decoded(cache.features(range(8), CPU))
    losses, _ = Distiller(student, [branch]).eval()(make_batch([features], 8, pixels))
    assert all(loss < 1e-5 * features.blocks[int(name[-1])].var() for name, loss in losses.items())
    distill(config, world / "cache", tmp_path / "run")
    found = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert found[0] > 5 * sum(losses.values()) and fmean(found[-7:]) < 0.9 * fmean(found[:7])


def test_a_copy_of_the_teacher_gets_registers_and_is_a_teacher(world: Path, tmp_path: Path) -> None:
    """Only the weights that are named are trained; the student's folder is a teacher's name."""
    sets = [
        "student.dim=24",
        "student.depth=4",
        "student.init=teacher",
        "student.registers=3",
        "distill.projector=none",
    ]
    named = ["reg_token", "pos_embed", "blocks.3"]
    config = world_config(world, *sets, f"distill.trained={json.dumps(named)}", "distill.optimizer=adamw")
    student = new_student(config.student, 32)
    start_student(student, config.student, _weights(world))
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    distill(config, world / "cache", tmp_path / "run")
    copy = load_saved(tmp_path / "run" / "student")
    assert (copy.prefix, copy.model_args["reg_tokens"]) == (4, 3)
    after = copy.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    begun = {name: any(f"{name}.".startswith(f"{part}.") for part in named) for name in after}
    assert {"reg_token", "pos_embed"} < {name for name in after if begun[name]} == moved
    again = world_config(world, f"teacher.name=local-dir:{tmp_path / 'run' / 'student'}", "cache.blocks=[3]")
    cache_teacher(again, str(world / "test" / "*.tar"), tmp_path / "cache")
    assert Cache(tmp_path / "cache").manifest.teacher.prefix_tokens == 4


def test_a_start_that_cannot_be_read_is_named_with_its_key(world: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    for place, message in ((tmp_path / "empty.pth", "the file is empty"), (tmp_path, "is not a model folder")):
        config = world_config(world, f"student.init={place}").student
        with pytest.raises(UserError, match=f"^student.init: .*{message}"):
            start_student(new_student(config, 32), config, _weights(world))


def test_parts_that_cannot_be_trained_and_registers_that_do_not_exist(world: Path, tmp_path: Path) -> None:
    for name in ("blocks.9", "block", "norm"):  # the norm comes after the last block that is compared
        config = world_config(world, f"distill.trained=[{name}]")
        with pytest.raises(UserError, match=rf"no weights '{name}' would be trained; there are cls_token, .*blocks\.2"):
            distill(config, world / "cache", tmp_path / "run")
    for name, wrong in (
        ("resnet18", "not for resnet18"),
        ("vit_tiny_patch16_24", "timm has no model"),
        (f"local-dir:{tmp_path}", "model folder"),
    ):
        with pytest.raises(UserError, match=wrong):
            new_student(StudentConfig(name=name, registers=2), 32)
    eva = new_student(StudentConfig(name="vit_small_patch16_dinov3", registers=2), 32)
    assert eva.prefix == 3


def test_what_is_missing_is_said_before_torch_is_imported() -> None:
    for given, message in (
        ("student.init=nothing", "no file or folder nothing; known besides: auto, teacher, random"),
        ("teacher.weights=nothing", "weights nothing: no such file"),
        ("distill.texts=nothing.npy", "distill.texts: nothing.npy does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            check_command("distill", load_config(sets=["student.init=teacher", given]))


def test_mistakes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = new_student(world_config(world, "student.dim=48").student, 32)
    start_student(wide, StudentConfig(init="auto"), _weights(world))
    assert (
        "does not start from weights of vit_tiny_patch16_224, the teacher: it has 24 channels"
        in capsys.readouterr().err
    )
    small = new_student(world_config(world).student, 32)
    for student, init, weights, message in (
        (wide, "teacher", _weights(world), "it has 24 channels and the student 48; or start from random weights"),
        (small, "teacher", _weights(world, digest="0"), "does not have the weights that were cached"),
        (small, str(tmp_path / "none"), _weights(world), "no such file"),
        (wide, str(world / "teacher"), _weights(world), "it has 24 channels and the student 48"),
    ):
        with pytest.raises(UserError, match=message):
            start_student(student, StudentConfig(init=init), weights)
