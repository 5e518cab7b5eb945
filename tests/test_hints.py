"""Names of other libraries lead to the model of timm that was meant."""

import pytest
import timm

from pipeline.models.hints import nearest_model
from pipeline.models.names import looks_like_path

MEANT = {
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "facebook/dinov2-base": "vit_base_patch14_dinov2",
    "facebook/dinov2-with-registers-large": "vit_large_patch14_reg4_dinov2",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dinov3_vitl16": "vit_large_patch16_dinov3",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3",
    "facebook/dinov3-vitb16-pretrain-lvd1689m": "vit_base_patch16_dinov3.lvd1689m",
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": "convnext_tiny.dinov3_lvd1689m",
    "ViT-B-16-SigLIP2": "vit_base_patch16_siglip_224.v2_webli",
    "google/siglip2-base-patch16-224": "vit_base_patch16_siglip_224.v2_webli",
    "google/siglip-large-patch16-384": "vit_large_patch16_siglip_384",
    "ViT-SO400M-14-SigLIP-384": "vit_so400m_patch14_siglip_384",
    "ViT-B/32": "vit_base_patch32_clip_224",
    "clip ViT-B/32": "vit_base_patch32_clip_224",
    "ViT-L/14@336px": "vit_large_patch14_clip_336",
    "ViT-bigG-14": "vit_gigantic_patch14_clip_224",
    "openai/clip-vit-large-patch14-336": "vit_large_patch14_clip_336.openai",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "vit_huge_patch14_clip_224.laion2b",
    "EVA02-L-14-336": "eva02_large_patch14_clip_336",
    "vit_b_16": "vit_base_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "facebook/vit-mae-base": "vit_base_patch16_224.mae",
    "google/vit-base-patch16-224-in21k": "vit_base_patch16_224.augreg_in21k",
    "facebook/deit-base-distilled-patch16-224": "deit_base_distilled_patch16_224",
    "deit3_large": "deit3_large_patch16_224",
    "deit3_l_16": "deit3_large_patch16_224",
    "microsoft/beit-base-patch16-224": "beit_base_patch16_224",
    "microsoft/swinv2-tiny-patch4-window8-256": "swinv2_tiny_window8_256",
    "swin_t": "swin_tiny_patch4_window7_224",
    "facebook/convnextv2-base-1k-224": "convnextv2_base",
    "facebook/sam-vit-base": "samvit_base_patch16",
    "nvidia/C-RADIOv3-B": "vit_base_patch16_radio_v3.c_radio",
    "PE-Core-L14-336": "vit_pe_core_large_patch14_336",
    "vit_smal_patch16_224": "vit_small_patch16_224",
    "vit_small_patch14_dino2": "vit_small_patch14_dinov2",
    "timm/vit_base_patch16_224.augreg_in21k": "vit_base_patch16_224.augreg_in21k",
    "xyz": None,
    "runs/first": None,
}


def test_what_was_meant() -> None:
    assert {name: nearest_model(name) for name in MEANT} == MEANT
    known = {*timm.list_models(), *timm.list_pretrained()}
    assert {model for model in MEANT.values() if model} <= known


def test_every_name_of_timm_is_itself() -> None:
    for model in timm.list_models()[::150]:
        assert nearest_model(model) == model


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("facebook/dinov2-base", False), ("ViT-B/32", False), ("hf-hub:a/b", False), ("vit_b_16", False),
        ("./a", True), ("~/a", True), ("/a", True), ("a/b/c", True), ("runs/first", True), ("google/a/b", True),
    ],
)  # fmt: skip
def test_names_of_hubs_are_no_paths(name: str, path: bool) -> None:
    assert looks_like_path(name) == path
