"""Teachers of every family, students, and what is saved of them."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import make_vit, seeded
from huggingface_hub.errors import LocalEntryNotFoundError

from pipeline.config import StudentConfig, load_config
from pipeline.models.backbone import save_backbone, weight_hash
from pipeline.models.loading import LOCAL, load_saved
from pipeline.models.weights import read_weights
from pipeline.students.new import new_student
from pipeline.teachers.teacher import load_teacher
from singer.backbones import block_outputs, depth, freeze_unused, resolve_blocks
from singer.errors import UserError
from singer.subspaces import reader_weight
from singer.suffix import TeacherSuffix, suffix_state

# family: (architecture, its own arguments, prefix tokens)
FAMILIES = {
    "augreg": ("vit_tiny_patch16_224", {}, 1),
    "deit": ("deit_tiny_distilled_patch16_224", {}, 2),
    "deit3": ("deit3_small_patch16_224", {}, 1),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}, 1),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}, 5),
    "clip": ("vit_base_patch16_clip_224", {}, 1),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 0}, 0),
    "parallel": ("vit_small_patch16_18x2_224", {}, 1),
    "gated": ("vit_giant_patch14_dinov2", {"num_classes": 0}, 1),
}


def test_a_folder_whose_image_size_is_a_list(tmp_path: Path) -> None:
    """As timm writes it."""
    vit = make_vit()
    save_backbone(vit, vit.model.state_dict(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["img_size"] = [vit.image_size] * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_saved(tmp_path).image_size == vit.image_size
    assert load_saved(tmp_path, 2 * vit.image_size).image_size == 2 * vit.image_size
    config["model_args"]["img_size"] = [vit.image_size, 2 * vit.image_size]
    (tmp_path / "config.json").write_text(json.dumps(config))
    wide = load_saved(tmp_path)
    assert (wide.image_size, wide.grid) == ((vit.image_size, 2 * vit.image_size), (4, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    """Loads from a folder at another resolution; taps equal hooks; the tail ends where the model ends."""
    architecture, args, prefix = FAMILIES[family]
    vit = make_vit(architecture, **args)
    save_backbone(vit, vit.model.state_dict(), tmp_path)
    config = load_config(sets=[f"teacher.name={LOCAL}{tmp_path}", "teacher.image_size=48"])
    teacher = load_teacher(config.teacher)
    assert teacher.prefix == prefix and teacher.grid == (6, 6)
    assert teacher.mean == (0.5, 0.5, 0.5)

    images = torch.randn(2, 3, 48, 48)
    hooked: dict[int, torch.Tensor] = {}
    handles = [
        teacher.model.blocks[b].register_forward_hook(lambda _m, _i, out, b=b: hooked.__setitem__(b, out))
        for b in (1, 2)
    ]
    with torch.inference_mode():
        logits = teacher.model(images)
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        tokens = block_outputs(teacher.model, images, [1, 2])
    for block, x in tokens.items():
        assert x.shape == (2, prefix + 36, 24)
        torch.testing.assert_close(x, hooked[block])

    suffix = TeacherSuffix(
        teacher.architecture, teacher.model_args, 1, suffix_state(teacher.model.state_dict(), first_block=1)
    )
    with torch.inference_mode():
        for block, x in tokens.items():
            torch.testing.assert_close(suffix.logits(x.clone(), block), logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(suffix.next_output(tokens[1].clone(), 1), tokens[2], atol=1e-5, rtol=1e-4)
    for block in (1, 3):
        assert reader_weight(suffix, block).shape[1] == 24


def test_nothing_behind_the_last_block_is_computed() -> None:
    vit = make_vit()
    called = []
    for b, block in enumerate(vit.model.blocks):
        block.register_forward_hook(lambda *_, b=b: called.append(b))
    block_outputs(vit.model, torch.randn(1, 3, 32, 32), [0, 2])
    assert called == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weight_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(seeded(1))
    model = timm.create_model("test_vit", num_classes=7).eval()
    file = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, file)
    else:
        safetensors.torch.save_file(model.state_dict(), file)
    sets = ["teacher.name=test_vit", f"teacher.weights={file}"]
    teacher = load_teacher(load_config(sets=sets).teacher)
    images = torch.randn(1, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(teacher.model(images), model(images))
    smaller = load_teacher(load_config(sets=[*sets, "teacher.image_size=128"]).teacher)
    assert smaller.image_size == 128 and smaller.model.pos_embed.shape[1] == 65
    assert weight_hash(smaller.model.state_dict()) == weight_hash(teacher.model.state_dict())
    with pytest.raises(UserError, match="weights .* do not fit test_vit2"):
        load_teacher(load_config(sets=["teacher.name=test_vit2", sets[1]]).teacher)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> object:
        if pretrained:
            raise LocalEntryNotFoundError("we cannot find the requested files") from ConnectionError("unreachable")
        return create(name, **kwargs)

    monkeypatch.setattr("pipeline.models.loading.timm.create_model", offline)
    message = r"of teacher.name vit_tiny_patch16_224 were not fetched: no network \(ConnectionError: unreachable\); "
    with pytest.raises(UserError, match=message + r"give a local file with --weights FILE \(teacher.weights\)$"):
        load_teacher(load_config(sets=["teacher.name=vit_tiny_patch16_224"]).teacher)


def test_weight_hash_sees_one_bit() -> None:
    state = make_vit().model.state_dict()
    before = weight_hash(state)
    state["blocks.0.mlp.fc1.weight"][0, 0] += 1e-3
    assert weight_hash(state) != before


def test_pickled_weights_are_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"x": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="trap.pth hold .* which is never unpickled"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["teacher.name=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["teacher.name=vit_tiny_patch16_224", "teacher.weights=/none.pth"], "weights /none.pth: no such file"),
        (["teacher.name=local-dir:/none"], "/none does not exist"),
        (["teacher.name=TEACHER", "teacher.image_size=36"], "36 is not a multiple of the patch size 8"),
    ],
)
def test_teacher_mistakes(world: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), tmp_path / "r.safetensors")
    replaced = [
        s.replace("WEIGHTS", str(tmp_path / "r.safetensors")).replace("TEACHER", f"{LOCAL}{world / 'teacher'}")
        for s in sets
    ]
    with pytest.raises(UserError) as error:
        load_teacher(load_config(sets=replaced).teacher)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_student_round_trip(tmp_path: Path) -> None:
    sets = ["student.dim=16", "student.depth=2", "student.heads=2", "student.patch_size=4"]
    student = new_student(load_config(sets=sets).student, 32)
    student.model.eval()
    assert student.grid == (8, 8) and depth(student.model) == 2 and student.width == 16
    save_backbone(student, student.model.state_dict(), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    again = load_saved(tmp_path)
    with torch.inference_mode():
        expected = student.model.forward_features(images)
        torch.testing.assert_close(plain.forward_features(images), expected)
        torch.testing.assert_close(again.model.forward_features(images), expected)
    without = new_student(load_config(sets=sets).student, 32, class_token=False)  # as its teacher
    save_backbone(without, without.model.state_dict(), tmp_path / "without")
    plain = timm.create_model(f"local-dir:{tmp_path / 'without'}", pretrained=True).eval()
    assert not without.has_cls and not without.prefix
    with torch.inference_mode():
        torch.testing.assert_close(plain(images), without.model.eval().forward_features(images).mean(1))
    named = new_student(load_config(sets=["student.name=vit_tiny_patch16_224"]).student, 64)
    assert named.width == 192 and named.grid == (4, 4)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["student.dim=16"], "student.name vit needs student.depth too"),
        (["student.dim=16", "student.depth=2", "student.heads=3"], "16 is not a multiple of student.heads 3"),
        (["student.name=vit_tiny_patch16_224", "student.dim=3"], "are for student.name vit"),
    ],
)
def test_student_mistakes(sets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_student(load_config(sets=sets).student, 32)


def test_frozen_parts_are_those_without_a_gradient() -> None:
    vit = make_vit(num_classes=0)
    freeze_unused(vit.model, 2, 32)
    block_outputs(vit.model, torch.randn(1, 3, 32, 32), [1, 2])[2].sum().backward()
    for name, p in vit.model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_resolve_blocks() -> None:
    assert resolve_blocks(None, 12) == [8, 11] and resolve_blocks(None, 24) == [17, 23]
    assert resolve_blocks([-1, 3], 12) == [3, 11] and resolve_blocks(None, 1) == [0]
    for wrong, message in (([12], "block 12 does not exist: this model has 12"), ([3, 3], "different"), ([], "one or")):
        with pytest.raises(UserError, match=message):
            resolve_blocks(wrong, 12)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_mambaout"])
def test_students_with_feature_maps(name: str, tmp_path: Path) -> None:
    """Stages are blocks, positions of their maps are patch tokens; saved and loaded, it is the same model."""
    student = new_student(StudentConfig(name=name, image_size=64), 32)
    assert not student.gives_tokens and not student.has_cls and student.prefix == 0 and student.image_size == 64
    stages = depth(student.model)
    images = torch.randn(2, 3, 64, 64)
    student.model.eval()
    tokens = block_outputs(student.model, images, range(stages))
    for stage, (width, (rows, columns)) in enumerate(student.layout):
        assert tokens[stage].shape == (2, rows * columns, width)
    maps = student.model.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(tokens[stages - 1][0, 0], maps[-1][0, :, 0, 0])
    save_backbone(student, student.model.state_dict(), tmp_path / "m")
    again = load_saved(tmp_path / "m")
    assert again.image_size == 64 and again.layout == student.layout
    torch.testing.assert_close(block_outputs(again.model, images, [stages - 1])[stages - 1], tokens[stages - 1])
    assert load_saved(tmp_path / "m", 96).image_size == 96


def test_students_that_give_no_feature_maps() -> None:
    with pytest.raises(UserError, match="student.name levit_128s gives no feature maps at 40 pixels"):
        new_student(StudentConfig(name="levit_128s", image_size=40), 32)


def test_arguments_that_an_architecture_does_not_take() -> None:
    with pytest.raises(UserError, match=r"^student.name test_resnet: .*unexpected keyword argument 'patch_size'"):
        new_student(StudentConfig(name="test_resnet", patch_size=7), 64)
