"""The frozen suffix of a teacher: what comes after the cached features, rebuilt without the rest of the model.

Any model of tokens has one if its blocks take tokens and constants, such as the rotary embedding of its grid, and if
its own output comes out of it (`find_suffix` tries that).
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singer import hf
from singer.backbones import block_outputs, depth, gives_tokens
from singer.errors import UserError
from singer.names import HF, OWN
from singer.sizes import ImageSize, Size

# What a model does before its first block.
_FRONT = (
    "patch_embed", "embeds", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre", "pos_drop", "patch_drop",
    "rope", "rel_pos_bias", "shared_rel_pos", "mask_token",
)  # fmt: skip
# The name, in the state of a suffix, of what a block is called with besides tokens: block.N.name.
_ARGUMENTS = "arguments."
_TOLERANCE = 1e-4
# A suffix computes in float32, also with the weights of a teacher of 16 bits.
_TOLERANCE_16_BITS = 0.05
NO_SUFFIX = (
    "this teacher has no suffix that can be rebuilt, so nothing can read features after a cached block; take "
    "refine.cleaner gated-adapter with refine.basis artifact and a number as refine.rank (the defaults), or clip, "
    "neighbour or none, and a distill.objective that compares tokens, such as mse"
)
# Their norm1 comes after the first branch.
_POST_NORM = (ResPostBlock, ResPostRelPosBlock, EvaBlockPostNorm)


def find_suffix(
    model: nn.Module, architecture: str, model_args: Mapping[str, Any], first_block: int, image_size: ImageSize
) -> dict[str, Tensor] | None:
    """Return the state of the suffix from first_block on; None if the model has no suffix.

    It is tried with one image (image_size in pixels): the suffix must give the model's own last block and output.
    """
    if not gives_tokens(model) or len(getattr(model, "blocks", ())) != depth(model) or architecture.startswith(OWN):
        return None
    tail = _suffix_model(model)
    if not _has_head(tail):
        return None
    place = next(model.parameters())
    image = torch.randn(1, 3, *Size.of(image_size), generator=torch.Generator().manual_seed(0)).to(place)
    last = depth(model) - 1
    arguments = _block_arguments(model, image, first_block)
    if arguments is None:
        return None
    state = {**suffix_state(tail.state_dict(), first_block), **arguments}
    state = {name: tensor.to(image.device) for name, tensor in state.items()}  # blocks may be elsewhere
    tolerance = _TOLERANCE if image.dtype == torch.float32 else _TOLERANCE_16_BITS
    with torch.no_grad():
        outputs = {b: x.float() for b, x in block_outputs(model, image, sorted({first_block, last})).items()}
        suffix = TeacherSuffix(architecture, model_args, first_block, state)
        if any(tensor.is_meta for tensor in (*suffix.parameters(), *suffix.buffers())):
            return None
        found = suffix.last_output(outputs[first_block], first_block), suffix.logits(outputs[last], last)
        same = all(
            x.shape == y.shape and bool((x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())))
            for x, y in zip(found, (outputs[last], model(image).float()), strict=True)
        )
    return state if same else None


def _has_head(model: nn.Module) -> bool:
    """Return whether a model has a final norm, and a head that takes normed tokens."""
    return isinstance(getattr(model, "norm", None), nn.Module) and callable(getattr(model, "forward_head", None))


def suffix_state(state: Mapping[str, Tensor], first_block: int) -> dict[str, Tensor]:
    """Take the part of a state dict that belongs to the suffix from first_block on."""
    kept = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in _FRONT or (parts[0] == "blocks" and int(parts[1]) < first_block):
            continue
        kept[name] = tensor
    return kept


@torch.no_grad()
def _block_arguments(model: nn.Module, image: Tensor, first_block: int) -> dict[str, Tensor] | None:
    """Return the tensors that blocks are called with besides tokens; None if they take anything else.

    Arguments must be given by name, because a suffix names them. A block takes what the block before it takes unless it
    has tensors of its own.
    """
    found: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    by_name = True

    def note(block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal by_name, last
        by_name &= all(arg is None for arg in args[1:])
        by_name &= all(isinstance(value, Tensor | bool | tuple | None) for value in kwargs.values())
        tensors = dict(_named_tensors(kwargs))
        if block == first_block or any(last.get(name) is not value for name, value in tensors.items()):
            found.update({f"{_ARGUMENTS}{block}.{name}": value.contiguous() for name, value in tensors.items()})
        last = tensors

    blocks: Any = model.blocks
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs, b=b: note(b, args, kwargs), with_kwargs=True)
        for b, block in enumerate(blocks)
        if b >= first_block
    ]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found if by_name else None


def _named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of arguments; those in a tuple, such as cos and sin, are name.0 and name.1."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from ((f"{name}.{n}", item) for n, item in enumerate(value) if isinstance(item, Tensor))


class TeacherSuffix(nn.Module):
    """Blocks first_block.. of a model of tokens with its final norm and head; frozen, in eval mode.

    It also holds the first cached block: some readers of its output need the block's own weights.
    architecture, model_args: what timm.create_model takes to build the teacher.
    state: what `find_suffix` returns.
    """

    def __init__(
        self, architecture: str, model_args: Mapping[str, Any], first_block: int, state: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            model: Any = _suffix_model(outline(architecture, model_args))
        self.depth = len(model.blocks)
        self.first_block = first_block
        for block in range(first_block):
            model.blocks[block] = nn.Identity()
        for name in _FRONT:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        own = {name: tensor for name, tensor in state.items() if not name.startswith(_ARGUMENTS)}
        model.load_state_dict(own, strict=True, assign=True)
        place = next((tensor.device for tensor in own.values()), torch.device("cpu"))
        _fill_buffers(model, place)
        self.model = model.requires_grad_(False).eval()
        self._arguments: dict[int, dict[str, str]] = {}
        for key, tensor in state.items():
            if key.startswith(_ARGUMENTS):
                block_number, name = key.removeprefix(_ARGUMENTS).split(".", 1)
                buffer_name = f"{name}_{block_number}".replace(".", "_")
                self.register_buffer(buffer_name, tensor, persistent=False)
                self._arguments.setdefault(int(block_number), {})[name] = buffer_name

    def block(self, index: int) -> nn.Module:
        """Return block `index` of the teacher. index: first_block to depth - 1."""
        assert self.first_block <= index < self.depth, f"the suffix has blocks {self.first_block} to {self.depth - 1}"
        module: nn.Module = self.model.blocks[index]
        return module

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """Compute the output (B, N, d) of block `index` for tokens (B, N, d)."""
        given = max((b for b in self._arguments if b <= index), default=None)
        block = self.block(index)
        # Some layers of transformers take a mask, which is None for images, without a default.
        takes = list(inspect.signature(block.forward).parameters.values())[1:]
        arguments: dict[str, Any] = {p.name: None for p in takes if p.kind < p.VAR_POSITIONAL and p.default is p.empty}
        for name, buffer in ({} if given is None else self._arguments[given]).items():
            whole, is_tuple, _ = name.partition(".")
            value = getattr(self, buffer)
            arguments[whole] = (*arguments.get(whole, ()), value) if is_tuple else value
        output: Any = block(tokens, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def is_last(self, block: int) -> bool:
        """Return whether a block is the teacher's last one."""
        return block == self.depth - 1

    def next_output(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of block + 1 for tokens (B, N, d) of `block`; return them if it is the last."""
        if self.is_last(block):
            return tokens
        return self.run_block(block + 1, tokens)

    def next_norm(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of the norm that first reads the tokens (B, N, d) of `block`."""
        module = self.model.norm if self.is_last(block) else first_norm(self.block(block + 1))
        output: Tensor = module(tokens)
        return output

    def last_output(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of the last block for the tokens (B, N, d) of `block`."""
        for index in range(block + 1, self.depth):
            tokens = self.run_block(index, tokens)
        return tokens

    def normed(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the final normed tokens (B, N, d) for the tokens (B, N, d) of `block`.

        In models that pool before their norm, it is fc_norm.
        """
        output: Tensor = self.model.norm(self.last_output(tokens, block))
        fc_norm = getattr(self.model, "fc_norm", None)
        return output if fc_norm is None else fc_norm(output)

    def logits(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the teacher's own output (B, classes) for the tokens (B, N, d) of `block`.

        It is the pooled features (B, d) if the teacher has no head.
        """
        output: Tensor = self.model.forward_head(self.model.norm(self.last_output(tokens, block)))
        return output


def _suffix_model(model: nn.Module) -> nn.Module:
    """Return the part of a model with its blocks, norm and head under timm's names; of timm's models, the model."""
    part: Any = getattr(model, "suffix_model", None)
    return model if part is None else part()


def outline(architecture: str, model_args: Mapping[str, Any]) -> Any:
    """Build a model of timm or transformers without the values of its tensors, which takes no memory."""
    with torch.device("meta"), _NoValues():
        if architecture.startswith(HF):
            return hf.build(architecture, model_args)
        return timm.create_model(architecture, pretrained=False, **model_args)


# What writes initial weights in place.
_WRITERS = {
    *(Tensor.add_, Tensor.clamp_, Tensor.erfinv_, Tensor.fill_, Tensor.mul_),
    *(Tensor.normal_, Tensor.uniform_, Tensor.zero_),
}


class _NoValues(TorchFunctionMode):
    """Leaves out initial weights, which take most of the time of building a model without values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _WRITERS and args[0].is_meta:
            return args[0]
        return function(*args, **(kwargs or {}))


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no state dict has, such as the indices of relative positions.

    Those of modules that cannot compute them stay on the meta device.
    """
    for module in model.modules():
        if not hasattr(module, "init_non_persistent_buffers"):
            continue
        computed = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name, buffer in computed:
            module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
        if computed:
            module.init_non_persistent_buffers()  # type: ignore[operator]


def first_norm(block: nn.Module) -> nn.Module:
    """Find the norm before a block's first branch. Raises UserError if it has none there (res-post-norm)."""
    norm = _first_norm(block)
    if norm is None:
        raise UserError(
            "these blocks have no norm at their input (they norm after each branch); use an objective other than "
            "relation, minilm and tinymim"
        )
    return norm


def has_first_norm(block: nn.Module) -> bool:
    """Return whether a block has a norm before its first branch."""
    return _first_norm(block) is not None


def _first_norm(block: nn.Module) -> nn.Module | None:
    for name in ("norm1", "in_norm", "layernorm_before", "layer_norm1"):
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module) and not isinstance(block, _POST_NORM):
            return norm
    branches = getattr(block, "attns", None)
    if isinstance(branches, nn.ModuleList):  # parallel branches, each with a norm of its own
        return next(m for n, m in branches[0].named_children() if n == "norm")
    return None
