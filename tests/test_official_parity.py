"""The `official` variant against what the authors' released code computes.

Every fixture in tests/parity holds a small teacher and student, all intermediate values of one step, and the losses and
adapters of 25 steps of joint training.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.cache.stored import Decoded
from pipeline.config import RefineConfig
from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.joint_training import JointTraining
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from singer.artifacts import BlockScale
from singer.backbones import block_outputs
from singer.cleaners import Adapter, BlockSpec
from singer.fit_context import FitContext
from singer.objectives import ObjectiveContext
from singer.objectives.mse import Mse
from singer.objectives.vitkd import Generator, VitKd
from singer.refiner import Refiner
from singer.subspaces import BASES, null_space_official
from singer.suffix import TeacherSuffix, suffix_state

FOLDER = Path(__file__).with_name("parity")
NAMES = ("one_intermediate", "two_intermediate")
ARCHITECTURE = "vit_tiny_patch16_224"
NO_SCALE = BlockScale(1.0, float("inf"))


@dataclass
class Fixture:
    """A fixture's settings and tensors, with teacher tail and student built from them."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def model_args(self, whose: str) -> dict[str, Any]:
        s = self.settings
        size = {"img_size": s["img"], "patch_size": s["patch"], "num_classes": 0}
        if whose == "teacher":
            return {**size, "embed_dim": s["dt"], "depth": s["Lt"], "num_heads": s["ht"]}
        return {**size, "embed_dim": s["ds"], "depth": s["Ls"], "num_heads": s["hs"]}

    def state(self, whose: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{whose}."): t for n, t in self.tensors.items() if n.startswith(f"{whose}.")}

    def suffix(self) -> TeacherSuffix:
        first = min(self.settings["layers"])
        return TeacherSuffix(
            ARCHITECTURE, self.model_args("teacher"), first, suffix_state(self.state("teacher"), first)
        )

    def student(self) -> Backbone:
        args = self.model_args("student")
        model = timm.create_model(ARCHITECTURE, **args)
        model.load_state_dict(self.state("student"))
        return Backbone(model, ARCHITECTURE, args, self.settings["img"], (0.5,) * 3, (0.5,) * 3)

    @property
    def matching(self) -> dict[int, int]:
        return dict(zip(self.settings["layers"], self.settings["student_layers"], strict=True))

    @property
    def features(self) -> dict[int, Tensor]:
        return {b: self.tensors[f"teacher_block_output.{b}"] for b in self.settings["layers"]}

    def projected(self) -> dict[int, Tensor]:
        """Student tokens, projected, by teacher block."""
        t = self.tensors
        return {
            teacher: F.linear(t[f"student_block_output.{b}"], t[f"projector.{b}.weight"], t[f"projector.{b}.bias"])
            for teacher, b in self.matching.items()
        }

    def distiller(self) -> Distiller:
        """Joint training as `distill` sets it up, from the stored start."""
        s, student = self.settings, self.student()
        grid = (s["img"] // s["patch"],) * 2
        teacher = SimpleNamespace(
            width_of=lambda block: s["dt"], grid_of=lambda block: grid, prefix_tokens=1, class_token=True
        )
        index = SimpleNamespace(images=SimpleNamespace(labels=np.empty(0, np.int32)))
        manifest = SimpleNamespace(teacher=teacher, sampled=False)
        cache = SimpleNamespace(
            manifest=manifest, index=index, decoder=lambda device: lambda features: features
        )  # decoded
        targets = Targets(cast(Any, cache), None, student, torch.device("cpu"))
        config = RefineConfig(
            variant="official", rank=s["rank"], quantile=s["q"], outlier_weight=s["wo"], info_weight=s["wi"]
        )
        refiner = Refiner({b: BlockSpec(s["dt"], 1, grid, s["rank"]) for b in s["layers"]}, "adapter", "none")
        joint = JointTraining(refiner, self.suffix(), dict.fromkeys(s["layers"], NO_SCALE), config, 1, {})
        head = TeacherBranch(student, self.matching, targets, Teaching({"mse": 1.0}, "linear", weight=s["wk"]), joint)
        distiller = Distiller(student, [head])
        with torch.no_grad():
            for teacher_block, b in self.matching.items():
                for part in ("weight", "bias"):
                    distiller.get_parameter(f"projectors.{teacher_block}.{part}").copy_(
                        self.tensors[f"projector.{b}.{part}"]
                    )
                for part in ("down", "up"):
                    stored = self.tensors[f"adapter_init.{teacher_block}.{part}"]
                    getattr(refiner.cleaner(teacher_block), part).copy_(stored)
        return distiller

    def losses(self, distiller: Distiller) -> dict[str, Tensor]:
        """By the fixture's names."""
        batch = self.settings["B"]
        weights, labels = torch.full((batch,), 1 / batch), torch.full((batch,), -1)
        # Images as the student normalises them, with mean and std 0.5.
        pixels = 255 * (0.5 + 0.5 * self.tensors["images"].permute(0, 2, 3, 1))
        batch = Batch({self.settings["img"]: pixels}, [Decoded(self.features)], weights, labels)
        found, _ = distiller(batch)
        kd = torch.stack([found[f"mse.{b}"] for b in self.settings["layers"]]).sum()
        return {"loss_kd": kd, "loss_info": found["info"], "loss_outlier": found["outlier"]}


@pytest.fixture(params=NAMES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    settings = json.loads((FOLDER / f"{request.param}.json").read_text())
    return Fixture(settings, load_file(FOLDER / f"{request.param}.safetensors"))


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """The norm of the difference over the norm of what is expected."""
    assert float((found.detach() - expected).norm()) <= relative * float(expected.norm())


def test_blocks_are_numbered_alike(fixture: Fixture) -> None:
    model = timm.create_model(ARCHITECTURE, **fixture.model_args("teacher")).eval()
    model.load_state_dict(fixture.state("teacher"))
    with torch.no_grad():
        outputs = block_outputs(model, fixture.tensors["images"], fixture.settings["layers"])
    for block, x in outputs.items():
        assert_close(x, fixture.features[block], 1e-5)


def test_start_is_orthonormal_and_below_the_threshold(fixture: Fixture) -> None:
    """The singular vectors are nearly degenerate: theirs and ours span parts of one space."""
    suffix, rank, limit = fixture.suffix(), fixture.settings["rank"], fixture.settings["thres"]
    for block, x in fixture.features.items():
        context = FitContext(suffix, block, x, NO_SCALE, 1, None)
        mlp = suffix.block(block if block == fixture.settings["Lt"] - 1 else block + 1).mlp
        _, values, right = np.linalg.svd((mlp.fc2.weight @ mlp.fc1.weight).double().numpy())
        space = torch.from_numpy(right[values < limit].T).float()
        assert space.shape[1] >= rank
        for directions in (null_space_official(context, rank, limit), fixture.tensors[f"adapter_init.{block}.down"]):
            assert_close(directions.T @ directions, torch.eye(rank), 1e-5)
            assert_close((space.T @ directions).norm(dim=0), torch.ones(rank), 1e-4)
        assert limit == 0.05  # the registry's
        directions = BASES["weights-official"](context, rank)
        adapter = Adapter(BlockSpec(x.shape[-1], 1, None, rank))
        adapter.start(directions, NO_SCALE, doubled=True)
        assert torch.equal(adapter.up, adapter.down.T)


def test_refined_features_losses_and_gradients(fixture: Fixture) -> None:
    distiller = fixture.distiller()
    assert distiller.adapters is not None
    refined = distiller.adapters(fixture.features)
    for block, x in refined.items():
        assert_close(x, fixture.tensors[f"refined_init.{block}"], 1e-5)
    losses = fixture.losses(distiller)
    for name, expected in fixture.settings["losses"].items():
        assert float(losses[name].detach()) == pytest.approx(expected, rel=1e-4)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {"student.patch_embed.proj.weight": distiller.student.patch_embed.proj.weight.grad}
    for block, b in fixture.matching.items():
        gradients[f"projector.{b}.weight"] = distiller.get_parameter(f"projectors.{block}.weight").grad
        for part in ("down", "up"):
            gradients[f"adapter.{block}.{part}"] = distiller.adapters.cleaner(block).get_parameter(part).grad
    stored = {n.removeprefix("grad."): t for n, t in fixture.tensors.items() if n.startswith("grad.")}
    assert set(stored) == set(gradients)
    for name, expected in stored.items():
        gradient = gradients[name]
        assert gradient is not None
        assert_close(gradient, expected, 1e-4)


def test_25_steps_of_joint_training(fixture: Fixture) -> None:
    distiller = fixture.distiller()
    assert distiller.adapters is not None
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    trajectory: list[Mapping[str, float]] = fixture.settings["trajectory_adamw_lr1e-3_wd1e-4"]
    assert len(trajectory) == 25
    for expected in trajectory:
        losses = fixture.losses(distiller)
        for name, value in expected.items():
            assert float(losses[name].detach()) == pytest.approx(value, rel=1e-3)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    for block in fixture.settings["layers"]:
        for part in ("down", "up"):
            parameter = distiller.adapters.cleaner(block).get_parameter(part).detach()
            assert_close(parameter, fixture.tensors[f"adapter_after25.{block}.{part}"], 1e-2)


def context(fixture: Fixture) -> ObjectiveContext:
    side = fixture.settings["img"] // fixture.settings["patch"]
    return ObjectiveContext(tuple(fixture.settings["layers"]), fixture.settings["dt"], 1, (side, side))


def test_fitnet(fixture: Fixture) -> None:
    """Their sum over layers is not averaged."""
    losses = Mse(context(fixture))(fixture.projected(), fixture.features)
    total = sum(float(loss.mean()) for loss in losses.values())
    assert total == pytest.approx(fixture.settings["fitnet_loss"], rel=1e-5)


def test_vitkd(fixture: Fixture) -> None:
    """Every layer by masked generation, with the stored generators and masks; a sum over layers times `wk`."""
    setting = context(fixture)
    assert setting.grid is not None
    objective = VitKd(setting)
    total, student = 0.0, fixture.projected()
    with torch.no_grad():
        objective.mask_token.copy_(fixture.tensors["vitkd.mask_token"])
        for block, b in fixture.matching.items():
            names = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
            state = {n: fixture.tensors[f"vitkd.generator.{b}.{n}"] for n in names}
            objective.generators[str(block)] = Generator(setting.width, setting.prefix, setting.grid)
            objective.generators[str(block)].load_state_dict(state)
            noise = fixture.tensors[f"vitkd.mask_noise.{b}"]
            total += float(objective.generation_loss(student[block], fixture.features[block], block, noise).mean())
    assert total * fixture.settings["wk"] == pytest.approx(fixture.settings["vitkd_loss"], rel=1e-5)
