"""Make any module a backbone: a description says what its blocks are, and hooks on them give their outputs.

timm's models need none of this. It is for models of transformers (`singer.hf`) and for modules of one's own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from singer.errors import UserError
from singer.sizes import ImageSize, Size, check_multiple
from singer.tokens import global_tokens

Run = Callable[[nn.Module, Tensor], object]


@dataclass(frozen=True)
class Description:
    """What distillation has to know of a module that takes normalised images (B, 3, H, W).

    blocks: the name of a list of blocks in the module ("encoder.layers"), or the names of single blocks in the order in
    which they run. A block returns its output, or a tuple that begins with it.
    image_size: of the input, in pixels: the side of a square, or (height, width).
    patch_size: of a patch, in pixels, if blocks give tokens (B, prefix + patches, d); None if they give feature
    maps (B, d, rows, columns).
    prefix: the number of tokens before the patches; class_token: whether the first of them is a class token.
    norm: the name of the norm of the tokens after the last block, if there is one.
    mean, std: of RGB in [0, 1], three numbers each; the default is that of most models, ImageNet's.
    """

    blocks: str | Sequence[str]
    image_size: ImageSize
    patch_size: ImageSize | None = None
    prefix: int = 0
    class_token: bool = False
    norm: str | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


class _Stop(Exception):
    """The last block that is wanted has run."""


class DescribedMaps(nn.Module):
    """A module whose blocks give feature maps (B, d, rows, columns), as a backbone.

    run: how the module is called with images; default: with nothing else.
    """

    def __init__(self, module: nn.Module, description: Description, run: Run | None = None) -> None:
        super().__init__()
        self.backbone, self.description, self._run = module, description, run
        self.feature_info = list(_block_names(module, description))
        self.pretrained_cfg: dict[str, Any] = {}
        self.num_classes = 0
        _find(module, description.norm or "")
        self.num_features = self._check()

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks, in the order in which they run."""
        return nn.ModuleList([_find(self.backbone, name) for name in self.feature_info])

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled output (B, d) of normalised images (B, 3, H, W)."""
        last = len(self.feature_info) - 1
        return self._outputs(images, [last])[last].mean((2, 3))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int],
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Tensor]:
        """Compute the maps (B, d, rows, columns) of the blocks `indices`, as timm's models do."""
        found = self._outputs(images, indices)
        return [found[index] for index in indices]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the module exempts from weight decay."""
        named: Any = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in named()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass, if the module can. Raises UserError if it cannot."""
        # The last two are those of transformers: newer versions warn of the last, and some models cannot.
        # Neither DDP nor a compiler gets along with reentrant checkpointing.
        own, new, old = "set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable"
        options, able = {"use_reentrant": False}, getattr(self.backbone, "supports_gradient_checkpointing", True)
        for name, arguments in ((own, ()), (new, (options,)), (old, (options,))):
            method: Any = getattr(self.backbone, name, None)
            if method is not None and able:
                method(*arguments)
                return
        raise UserError(f"student.checkpointing: {type(self.backbone).__name__} has no set_grad_checkpointing")

    def _outputs(self, images: Tensor, indices: Sequence[int]) -> dict[int, Tensor]:
        """Run the module, to the last wanted block where no gradients are needed; return {index: output}."""
        found: dict[int, Tensor] = {}
        # Compilers and exporters cannot follow an exception, and with gradients the student is trained to its end.
        stops = not torch.is_grad_enabled() and not torch.compiler.is_compiling()

        def keep(index: int, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if stops and index == max(indices):
                raise _Stop

        blocks = self.blocks
        hooks = [
            blocks[index].register_forward_hook(lambda _module, _args, output, i=index: keep(i, output))
            for index in set(indices)
        ]
        try:
            self.backbone(images) if self._run is None else self._run(self.backbone, images)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def _check(self) -> int:
        """Run the module once; return the width of the last block. Raises UserError if a block is not as described."""
        place, size = next(self.backbone.parameters()), Size.of(self.description.image_size)
        if place.is_meta:
            return 0
        training = self.backbone.training
        self.backbone.eval()
        outputs = self._outputs(torch.zeros(1, 3, *size).to(place), range(len(self.feature_info)))
        self.backbone.train(training)
        width = 0
        for number, name in enumerate(self.feature_info):
            output, block = outputs.get(number), f"{type(self.backbone).__name__}: block {name}"
            if not isinstance(output, Tensor):
                got = "does not run" if output is None else f"returns a {type(output).__name__}"
                raise UserError(f"{block} {got}; blocks give tensors {self._shape()}")
            if not self._fits(output):
                raise UserError(f"{block} returns {tuple(output.shape)} at {size} pixels, not {self._shape()}")
            width = int(output.shape[1 if output.dim() == 4 else -1])
        return width

    def _shape(self) -> str:
        return "(B, d, rows, columns); for tokens, describe a patch_size"

    def _fits(self, output: Tensor) -> bool:
        return output.dim() == 4


class DescribedTokens(DescribedMaps):
    """A module whose blocks give tokens (B, prefix + patches, d), as a backbone; see DescribedMaps."""

    def __init__(self, module: nn.Module, description: Description, run: Run | None = None) -> None:
        self.num_prefix_tokens, self.has_class_token = description.prefix, description.class_token
        self.global_pool = "token" if description.class_token else "avg"
        assert description.patch_size is not None
        self.patch_size = description.patch_size
        super().__init__(module, description, run)

    @property
    def norm(self) -> nn.Module:
        """Return the final norm of the tokens; the identity if there is none."""
        return _find(self.backbone, self.description.norm) if self.description.norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Compute the pooled output (B, d) of normalised images (B, 3, H, W): the normed CLS, or the mean patch."""
        last = len(self.feature_info) - 1
        tokens = self.norm(self._outputs(images, [last])[last])
        return global_tokens(tokens, self.num_prefix_tokens, self.has_class_token)

    def forward_intermediates(  # type: ignore[override]
        self,
        images: Tensor,
        indices: Sequence[int],
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NLC",
        intermediates_only: bool = True,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Compute patch tokens (B, patches, d) of the blocks `indices`, as timm's models do.

        output_fmt: NCHW for maps (B, d, rows, columns); return_prefix_tokens: pairs of patches and prefix tokens.
        """
        found, prefix = self._outputs(images, indices), self.num_prefix_tokens
        tokens = [self.norm(found[i]) if norm else found[i] for i in indices]
        patches = [x[:, prefix:] for x in tokens]
        if output_fmt == "NCHW":
            grid = Size(*images.shape[-2:]).grid(self.patch_size)
            patches = [x.transpose(1, 2).unflatten(2, grid) for x in patches]
        if return_prefix_tokens:
            return [(patch, x[:, :prefix]) for patch, x in zip(patches, tokens, strict=True)]
        return patches

    def suffix_model(self) -> nn.Module:
        """Return the blocks, the final norm and the pooling, named as in a model of timm."""
        return _Suffix(self.blocks, self.norm, self.description)

    def _shape(self) -> str:
        return f"(B, {self.description.prefix} prefix + {self._patches} patches, d)"

    def _fits(self, output: Tensor) -> bool:
        return output.dim() == 3 and output.shape[1] == self.description.prefix + self._patches

    @property
    def _patches(self) -> int:
        rows, columns = Size.of(self.description.image_size).grid(self.patch_size)
        return rows * columns


class _Suffix(nn.Module):
    """What comes after the first block: blocks, final norm and pooling."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module, description: Description) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = blocks, norm, nn.Identity()
        self._description = description

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Pool normed tokens (B, N, d) to (B, d)."""
        return global_tokens(tokens, self._description.prefix, self._description.class_token)


def as_backbone(module: nn.Module, description: Description, run: Run | None = None) -> DescribedMaps:
    """Make a module a backbone. Raises UserError if it is not as described."""
    description = replace(description, mean=_three("mean", description), std=_three("std", description))
    if description.patch_size is None:
        if description.prefix or description.class_token:
            raise UserError("prefix tokens are for blocks that give tokens: describe the patch_size, too")
        return DescribedMaps(module, description, run)
    check_multiple(description.image_size, description.patch_size)
    if description.class_token > description.prefix:
        raise UserError("a class token is one of the prefix tokens: describe prefix=1 or more")
    return DescribedTokens(module, description, run)


def _three(name: str, description: Description) -> tuple[float, ...]:
    """Return the mean or std of RGB as a tuple. Raises UserError unless it is three numbers, of a std above 0."""
    given = getattr(description, name)
    try:
        numbers = tuple(float(number) for number in given)
    except (TypeError, ValueError):
        numbers = ()
    fits = len(numbers) == 3 and all(math.isfinite(number) for number in numbers)
    if not fits or (name == "std" and min(numbers) <= 0):
        raise UserError(f"{name} takes three numbers{' above 0' if name == 'std' else ''}, not {given}")
    return numbers


def _block_names(module: nn.Module, description: Description) -> list[str]:
    """Return the names of the blocks. Raises UserError if the module has no such list of blocks."""
    if not isinstance(description.blocks, str):
        return list(description.blocks)
    blocks = _find(module, description.blocks)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise UserError(
            f"{type(module).__name__}: {description.blocks} is a {type(blocks).__name__} and no list of blocks; name a "
            "ModuleList or Sequential, or the single blocks"
        )
    return [f"{description.blocks}.{n}" for n in range(len(blocks))]


def _find(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that name. Raises UserError if there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        inside = ", ".join(n for n, _ in module.named_children())
        raise UserError(f"{type(module).__name__} has no module {name!r}; it has {inside}") from None
