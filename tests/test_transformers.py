"""Models of Hugging Face transformers as teachers and students; the same weights in timm give the same features."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_with, run_singer, seeded
from huggingface_hub.errors import GatedRepoError
from PIL import Image, ImageOps

from pipeline.cache.reader import Cache
from pipeline.models import huggingface
from pipeline.models.backbone import save_backbone, weight_hash
from pipeline.models.huggingface import preprocessing
from pipeline.models.loading import create_model, load_model, load_saved
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.stages.refine import refine
from singer import hf
from singer.backbones import block_outputs, depth
from singer.errors import UserError
from singer.suffix import TeacherSuffix, find_suffix

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra hf)")

SIZE, WIDTH = 32, 24
VIT = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH,
       "image_size": SIZE, "patch_size": 8, "layer_norm_eps": 1e-6}  # fmt: skip
CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64}
# {model type: (its configuration, prefix tokens, whether the first is CLS)}
FAMILIES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "dinov2": (VIT, 1, True),
    "dinov2_with_registers": (VIT | {"num_register_tokens": 4}, 5, True),
    "dinov3_vit": (VIT | {"num_register_tokens": 4, "layer_norm_eps": 1e-5}, 5, True),
    "dinov3_convnext": (CONVNEXT, 0, False),
    "vit": (VIT, 1, True),
    "deit": (VIT, 2, True),
    "clip_vision_model": (VIT, 1, True),
    "siglip_vision_model": (VIT | {"hidden_act": "gelu"}, 0, False),
    "siglip2_vision_model": (VIT | {"num_patches": 16}, 0, False),
    "vit_mae": (VIT, 1, True),
    "data2vec-vision": (VIT | {"use_shared_relative_position_bias": True}, 1, True),
    "ijepa": (VIT, 0, False),
}
PROCESSOR = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
             "rescale_factor": 1 / 255}  # fmt: skip
# {model type: the same model in timm}
TWINS = {
    "dinov2": "vit_small_patch14_dinov2",
    "dinov3_vit": "vit_small_patch16_dinov3_qkvb",
    "vit": "vit_tiny_patch16_224",
    "siglip_vision_model": "vit_base_patch16_siglip_224",
}


def build(kind: str, **more: Any) -> torch.nn.Module:
    """A small model of a family whose weights are all random."""
    model = hf.build(f"hf:{kind}", FAMILIES[kind][0] | more).eval()
    generator = torch.Generator().manual_seed(seeded(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            parameter.add_(float(name.endswith("weight") and parameter.dim() == 1))
    return model


def save(kind: str, folder: Path, **more: Any) -> torch.nn.Module:
    """Save such a model as transformers does, with a processor file."""
    model = build(kind, **more)
    model.backbone.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


def to_timm(state: dict[str, torch.Tensor], eva: bool) -> dict[str, torch.Tensor]:
    """Rename the tensors of a model of transformers as timm has them."""
    scale = r"gamma_\1" if eva else r"ls\1.gamma"
    renames = [
        (r"^(layers|encoder\.layers?|model\.layer)\.", "blocks."), (r"(layernorm_before|layer_norm1)", "norm1"),
        (r"(layernorm_after|layer_norm2)", "norm2"), (r"(attention|self_attn)\.(o_proj|out_proj)", "attn.proj"),
        (r"(attention|self_attn)\.", "attn."), (r"layer_scale(\d)\.lambda1", scale), (r"up_proj", "fc1"),
        (r"down_proj", "fc2"), (r"embeddings\.patch_embeddings?(\.projection)?", "patch_embed.proj"),
        (r"embeddings\.position_embeddings?(\.weight)?", "pos_embed"), (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.", ""), (r"^(post_)?layernorm", "norm"),
    ]  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        found[name] = tensor[None] if name == "pos_embed" and tensor.dim() == 2 else tensor
    for name in [n for n in found if ".q_proj." in n]:
        parts = {x: found.pop(name.replace("q_proj", f"{x}_proj"), None) for x in "qkv"}
        if eva and name.endswith("bias"):
            found |= {name.replace("q_proj.bias", f"{x}_bias"): parts[x] for x in "qv"}
        else:
            found[name.replace("q_proj", "qkv")] = torch.cat(list(parts.values()))
    return {n: t for n, t in found.items() if not n.startswith(("mask_token", "head."))}


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_and_suffix_are_the_models_own(kind: str) -> None:
    model, (arguments, prefix, cls) = build(kind), FAMILIES[kind]
    size = model.description.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seeded(1)))
    last = depth(model) - 1
    with torch.no_grad():
        outputs = block_outputs(model, images, range(last + 1))
        assert prefix == getattr(model, "num_prefix_tokens", 0) and cls == getattr(model, "has_class_token", False)
        if kind == "dinov3_convnext":
            expected = model.backbone(images, output_hidden_states=True).hidden_states[-4:]
            assert [x.shape[-1] for x in outputs.values()] == CONVNEXT["hidden_sizes"]
            for block, x in enumerate(expected):
                torch.testing.assert_close(outputs[block], x.flatten(2).transpose(1, 2))
            return
        # The model itself returns the final norm of the last block's tokens; CLIP norms only what it pools.
        own = hf._run(model.backbone, images)
        normed = outputs[last] if kind == "clip_vision_model" else model.norm(outputs[last])
        torch.testing.assert_close(normed, own.last_hidden_state, atol=1e-5, rtol=1e-5)
        assert len({float(x.sum()) for x in outputs.values()}) == last + 1
        for block in range(last + 1):
            state = find_suffix(model, f"hf:{kind}", arguments, block, size)
            assert state is not None
            suffix = TeacherSuffix(f"hf:{kind}", arguments, block, state)
            torch.testing.assert_close(suffix.last_output(outputs[block], block), outputs[last], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(suffix.logits(outputs[block], block), model(images), atol=1e-5, rtol=1e-5)
        twice = torch.zeros(1, 3, 2 * size, 2 * size)
        assert block_outputs(model, twice, [0])[0].shape[1] == prefix + 4 * 16
        wide = hf.wrap(f"hf:{kind}", model.backbone, (size, 2 * size)).eval()
        assert block_outputs(wide, twice[:, :, :size], [last])[last].shape[1] == prefix + 2 * 16
        assert find_suffix(wide, f"hf:{kind}", arguments, last, (size, 2 * size)) is not None


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    found, runs = [], []
    if kind == "dinov3_convnext":
        with pytest.raises(UserError, match="student.checkpointing: DINOv3ConvNextModel has no"):
            build(kind).set_grad_checkpointing()
        return
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeded(1)))
    for checkpointing in (False, True):
        model = build(kind).train()
        if checkpointing:
            model.set_grad_checkpointing()
        inner, calls = next(m for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)), list[None]()
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        torch.manual_seed(seeded(2))  # a DINOv3 in training changes its positions at random
        outputs = block_outputs(model, images, [0, depth(model) - 1])
        torch.stack([x.square().mean() for x in outputs.values()]).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        runs.append(len(calls))
    assert runs == [1, 2], "the first block runs again in the backward pass"
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_no_image_is_masked() -> None:
    """A ViT-MAE gives the tokens of the ViT with the same weights, in their order."""
    model = build("vit_mae", mask_ratio=0.75)
    vit = hf.build("hf:vit", VIT).eval()
    vit.backbone.load_state_dict(model.backbone.state_dict())
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeded(1)))
    with torch.no_grad():
        torch.testing.assert_close(block_outputs(model, images, [2]), block_outputs(vit, images, [2]))


@pytest.mark.parametrize("kind", TWINS)
def test_the_same_weights_in_timm_give_the_same_cached_features(kind: str, few_shards: str, tmp_path: Path) -> None:
    model = save(kind, tmp_path / "hf")
    args = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2, "patch_size": 8, "num_classes": 0}
    torch.manual_seed(seeded(0))
    twin = create_model(TWINS[kind], SIZE, args, None, False, "model")
    lacks = twin.model.load_state_dict(to_timm(model.backbone.state_dict(), kind == "dinov3_vit"), strict=False)
    assert not lacks.unexpected_keys and all(name.startswith("attn_pool.") for name in lacks.missing_keys)
    teacher = load_model(f"hf:{tmp_path / 'hf'}")
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeded(1)))
    with torch.no_grad():
        ours, theirs = (block_outputs(m.model.eval(), images, range(3)) for m in (teacher, twin))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    twin = type(twin)(**{**vars(twin), "mean": teacher.mean, "std": teacher.std})
    save_backbone(twin, twin.model.state_dict(), tmp_path / "timm")
    caches = []
    for name in (f"hf:{tmp_path / 'hf'}", f"local-dir:{tmp_path / 'timm'}"):
        config = config_with(f"teacher.name={name}", "cache.blocks=[1,2]", "cache.codec=float16")
        place = tmp_path / f"cache-{name.split(':')[0]}"
        cache_teacher(config, few_shards, place)
        caches.append(Cache(place))
    first, second = (cache.features(np.arange(20), torch.device("cpu")) for cache in caches)
    for block in (1, 2):
        # Beyond what the models differ by, float16 rounds to one of two neighbours.
        torch.testing.assert_close(first[block], second[block], atol=1e-4, rtol=1e-3)
    a, b = (cache.manifest.teacher for cache in caches)
    assert (a.grid, a.prefix_tokens, a.class_token, a.width) == (b.grid, b.prefix_tokens, b.class_token, b.width)


def test_from_images_to_an_exported_student(
    few_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the paper's adapters, which read with the suffix; the student is of transformers, too."""
    save("dinov2", tmp_path / "teacher")
    save("vit", tmp_path / "student", num_hidden_layers=2)
    config = config_with(
        f"teacher.name=local-dir:{tmp_path / 'teacher'}", "cache.blocks=[1,2]", "refine.steps=3", "refine.batch_size=4",
        f"student.name=hf:{tmp_path / 'student'}", "student.dim=null", "student.depth=null", "student.heads=null",
        "student.patch_size=null", "distill.epochs=1", "distill.batch_size=8",
    )  # fmt: skip
    cache_teacher(config, few_shards, tmp_path / "cache")
    assert Cache(tmp_path / "cache").manifest.teacher.architecture == "hf:dinov2"
    refine(config, tmp_path / "cache", tmp_path / "refiner")
    run = distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner")
    assert np.isfinite(run.loss)
    assert set(evaluate(config, tmp_path / "run", few_shards, few_shards).linear) == {"cls", "mean_patch"}
    saved = load_saved(tmp_path / "run" / "student")
    assert (saved.architecture, saved.mean) == ("hf:vit", (0.4, 0.5, 0.6))
    assert export(config, tmp_path / "run", tmp_path / "exported", "torch-export").max_difference < 1e-4
    with pytest.raises(UserError, match="--to timm is for models of timm.*onnx or torch-export"):
        export(config, tmp_path / "run", tmp_path / "timm", "timm")
    export(config, tmp_path / "run", tmp_path / "hub", "hf")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "the forward pass of transformers: the CLS" in card
    assert "timm.create_model" not in card and "\n- timm\n" not in card
    again = load_model(f"hf:{tmp_path / 'hub'}")
    assert weight_hash(again.model.state_dict()) == weight_hash(saved.model.state_dict())
    assert (again.mean, again.image_size) == (saved.mean, saved.image_size)
    assert "stripped" not in capsys.readouterr().err
    # The processor of transformers makes the same input as the code of the card, but for the rounding of its resizing.
    ramp = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hub")
    theirs = processor(Image.fromarray(ramp), return_tensors="pt")
    ours = ImageOps.fit(Image.fromarray(ramp), (SIZE, SIZE), Image.Resampling.BICUBIC)
    expected = torch.from_numpy((np.asarray(ours) / 255 - saved.mean) / saved.std).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(theirs["pixel_values"], expected, atol=0.05, rtol=0)


def test_preprocessing_of_processor_files() -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    cropped = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}
    assert preprocessing(half | cropped, 64) == (32, (0.5,) * 3, (0.25,) * 3)
    assert preprocessing(half | {"size": {"shortest_edge": 40}}, 64)[0] == 40
    assert preprocessing(half | {"rescale_factor": 1 / 127.5}, 64) == (64, (0.25,) * 3, (0.125,) * 3)
    assert preprocessing({"do_normalize": False, "size": 16}, 64) == (16, (0.0,) * 3, (1.0,) * 3)
    assert preprocessing(half | {"size": {"height": 32, "width": 48}}, 64)[0] == (32, 48)
    with pytest.raises(UserError, match="its processor file gives neither one size nor height and width"):
        preprocessing(half | {"size": {"shortest_edge": 32, "longest_edge": 48}}, 64)


def test_towers_of_two(tmp_path: Path) -> None:
    """Of a CLIP with both towers, the one that sees is taken, with its weights."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "vocab_size": 99}  # fmt: skip
    torch.manual_seed(seeded(0))
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8))
    both.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    teacher = load_saved(tmp_path)
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeded(1)))
    with torch.no_grad():
        expected = both.eval().vision_model(images).last_hidden_state
    torch.testing.assert_close(block_outputs(teacher.model, images, [2])[2], expected)


def test_what_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("vit", tmp_path / "m")
    config_file, processor, weights = (
        tmp_path / "m" / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")
    )
    name = f"hf:{tmp_path / 'm'}"
    with pytest.raises(UserError, match="image_size 30 is not a multiple of the patch size 8; the nearest is 32"):
        load_model(name, image_size=30)
    weights.rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors, .* could run code; .*save_pretrained"):
        load_model(name)
    weights.write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match="weights of model hf:.* were not loaded"):
        load_model(name)
    processor.unlink()
    with pytest.raises(UserError, match="no preprocessor_config.json with image_mean"):
        load_model(name)
    config_file.write_text(json.dumps({"model_type": "strange", "auto_map": {}}))
    with pytest.raises(UserError, match="'strange' is not among .*code that comes with a model is never run"):
        load_model(name)
    config_file.write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(UserError, match=r"no config.json of transformers; as a model of timm it is hf-hub:"):
        load_model(name)
    with pytest.raises(UserError, match="student.name hf:.*patch_size can be chosen only for a model of timm"):
        create_model(name, 32, {"patch_size": 8}, None, False, "student.name")


def test_gated_and_absent_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"hf:someone/model was not fetched: no network .*give the folder"):
        load_model("hf:someone/model")

    def refuse(*_: object) -> str:
        error = GatedRepoError.__new__(GatedRepoError)
        raise error

    monkeypatch.setattr(huggingface, "hf_hub_download", refuse)
    with pytest.raises(UserError, match="https://huggingface.co/facebook/dinov3, accept the terms .*hf auth login"):
        load_model("hf:facebook/dinov3")


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.checks.find_spec", lambda name: None)
    (tmp_path / "x.tar").touch()
    code = run_singer(monkeypatch, "cache-teacher", "--images", tmp_path / "x.tar", "--out", tmp_path / "out",
                      "--teacher", "hf:facebook/dinov2-small")  # fmt: skip
    assert code == 2 and "needs the package transformers: pip install 'singer-vit[hf]'" in capsys.readouterr().err
