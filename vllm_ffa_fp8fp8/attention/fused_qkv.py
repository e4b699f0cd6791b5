"""From an attention module's hidden states to its attention in one operator: projection, norms,
rotation and cache write come before vLLM's attention as one kernel, or two."""

from dataclasses import dataclass, replace

import torch
from torch.library import Library
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from vllm_ffa_fp8fp8.attention.weight_places import WeightPlaces
from vllm_ffa_fp8fp8.integration import compat, patches
from vllm_ffa_fp8fp8.kernels.projection.qkv_heads import QKVHeads
from vllm_ffa_fp8fp8.registry import FUSED_ATTENTION_OP

logger = init_logger(f"vllm.{__name__}")
_encode_layer_name = compat.layer_name_encoder()  # here: compiled code is to import nothing

FROM_HIDDEN_STATES, FROM_PROJECTIONS = "from hidden states", "from projections"
"""Where the operator starts: with the projection, or, where that is no plain matrix, behind it."""


@dataclass
class FusedQKV:
    """What the operator needs of one attention module.

    Args:
        attention: the module, with its `qkv_proj`.
        heads: what happens to q, k and v.
        hidden_size: elements of a hidden state.
        largest_projected_batch: tokens up to which the projection is part of the kernel.
        places: where what the operator reads of the module lies.
    """

    attention: torch.nn.Module
    heads: QKVHeads
    hidden_size: int
    largest_projected_batch: int
    places: WeightPlaces

    def heads_now(self) -> QKVHeads:
        """`heads`, with the norms and the rotation that the module has now."""
        if self.places.have_moved():
            self.heads = replace(self.heads, **_head_tensors(self.attention))
        return self.heads

    @property
    def starts_projected(self) -> bool:
        return self.attention.fused_path == FROM_PROJECTIONS

    @property
    def kind(self) -> tuple:
        """What decides, beside the number of tokens, which code its kernels have."""
        heads, has_bias = self.heads, self.attention.qkv_proj.bias is not None
        way = (self.starts_projected, self.largest_projected_batch, self.hidden_size, has_bias)
        return *way, heads.shape, heads.query_norm is not None, heads.cos_sin_cache.dtype


def fuse(impl, attention: torch.nn.Module, vllm_config) -> FusedQKV | None:
    """Makes `attention`, the module around the layer of `impl`, run fused; None, and vLLM's own
    forward, where its forward does other things than the kernels. Logs what runs and why."""
    name = type(attention).__name__
    attention.fused_path = None
    if not compat.is_fusable_forward(type(attention).forward):
        logger.info_once("fused_kproj: off for %s, whose forward is another.", name)
        return None
    problem = compat.attention_problem(attention, impl.head_size) or _offloaded(attention)
    if problem:
        logger.info_once("fused_kproj: off for %s: %s.", name, problem)
        return None
    if too_short := _too_short_for(attention, vllm_config.model_config.max_model_len):
        logger.warning_once("fused_kproj: off for %s: %s.", name, too_short)
        return None
    norms = compat.head_norms(attention)
    heads = QKVHeads(
        impl.num_heads,
        impl.num_kv_heads,
        impl.head_size,
        is_neox_style=attention.rotary_emb.is_neox_style,
        epsilon=norms[0].variance_epsilon if norms else 0.0,
        **_head_tensors(attention),
    )
    linear = attention.qkv_proj
    problem = compat.projection_problem(linear, vllm_config)
    largest = 0 if problem else impl.ops.largest_projected_batch(linear.input_size)
    if problem:
        way = f"its linear layer, since {problem}, then one kernel to the cache"
    elif largest == 0:
        way = "its linear layer, then one kernel to the cache"
    else:
        way = f"one kernel from projection to cache up to {largest} tokens, beyond them two"
    logger.info_once("fused_kproj: %s runs %s.", name, way)
    attention.fused_path = FROM_PROJECTIONS if problem else FROM_HIDDEN_STATES
    patches.split_graphs_at_fused_attention(vllm_config.compilation_config)
    patches.fuse_forward(_class_of_forward(attention), fused_forward)
    places = WeightPlaces(_tensors_of_operator(attention), vllm_config)
    return FusedQKV(attention, heads, linear.input_size, largest, places)


def _too_short_for(attention: torch.nn.Module, max_model_len: int) -> str | None:
    """Why the table of rotations does not reach the last position that a request can have, or
    None. vLLM's own rotation reads on behind its end, and so its answers are kept."""
    rows = attention.rotary_emb.cos_sin_cache.shape[0]
    if rows >= max_model_len:
        return None
    return (
        f"its rotary table has {rows} positions and max_model_len is {max_model_len}; what vLLM's "
        f"rotation gives beyond the table is undefined; set --max-model-len to {rows} or less"
    )


def _head_tensors(attention: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of QKVHeads, by its names for them."""
    tensors = {"cos_sin_cache": attention.rotary_emb.cos_sin_cache}
    if norms := compat.head_norms(attention):
        tensors |= {"query_norm": norms[0].weight.data, "key_norm": norms[1].weight.data}
    return tensors


def _tensors_of_operator(attention: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """What the operator reads of the module, but for a projection that runs before it."""
    tensors = [(attention.rotary_emb, "cos_sin_cache")]
    tensors += [(norm, "weight") for norm in compat.head_norms(attention) or ()]
    if attention.fused_path == FROM_HIDDEN_STATES:
        linear = attention.qkv_proj
        tensors += [(linear, name) for name, _ in linear.named_parameters(recurse=False)]
    return tensors


def _offloaded(attention: torch.nn.Module) -> str | None:
    """Which weight of the kernels is not where they run, or None: vLLM offloads weights to the
    CPU and has them back, elsewhere, for the module's own forward only."""
    device = attention.rotary_emb.cos_sin_cache.device
    for module in (attention.qkv_proj, *(compat.head_norms(attention) or ())):
        for name, weight in module.named_parameters():
            if weight.device != device:
                return f"the {name} of its {type(module).__name__} is offloaded to {weight.device}"
    return None


def _class_of_forward(module: torch.nn.Module) -> type:
    return next(base for base in type(module).__mro__ if "forward" in vars(base))


def fused_forward(
    attention: torch.nn.Module,
    positions: torch.Tensor,  # [num_tokens]
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
) -> torch.Tensor:
    """The forward of an attention module whose `fused_path` is set."""
    x, is_projected = hidden_states, attention.fused_path == FROM_PROJECTIONS
    if is_projected:
        x, _ = attention.qkv_proj(hidden_states)
    # Made here, not in the operator: a piecewise CUDA graph finds it where it was at its capture.
    attended = torch.empty(hidden_states.shape[0], attention.q_size, dtype=x.dtype, device=x.device)
    layer_name = _encode_layer_name(attention.attn.layer_name)
    torch.ops.vllm_ffa.fused_attention(x, positions, attended, layer_name, is_projected)
    output, _ = attention.o_proj(attended)
    return output


@eager_break_during_capture  # graphs cut by functions are cut here, as others at the operator
@maybe_transfer_kv_layer  # KV connectors, as around vLLM's own attention
def fused_attention(
    x: torch.Tensor,
    positions: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    is_projected: bool,
) -> None:
    """Writes the attention of hidden states, or of their projections, to `output` `[num_tokens,
    num_heads * head_size]`, and the new keys and values to the cache first."""
    metadata, layer, kv_cache, slot_mapping = compat.attention_context(layer_name)
    impl = layer.impl
    fused, heads, num_tokens = impl.fused_qkv, impl.fused_qkv.heads_now(), x.shape[0]
    planes = impl.planes(kv_cache) if slot_mapping is not None else None
    if is_projected:
        # x belongs to the graph: it is not to be changed
        qkv, rotated = x, x.new_empty(num_tokens, heads.query_size + heads.key_value_size)
        impl.ops.rope_and_write(qkv, positions, heads, planes, slot_mapping, rotated)
    elif num_tokens <= fused.largest_projected_batch:
        qkv = rotated = x.new_empty(num_tokens, heads.num_all_heads * heads.head_size)
        linear = fused.attention.qkv_proj
        impl.ops.project_rope_and_write(x, linear, positions, heads, planes, slot_mapping, rotated)
    else:
        qkv, _ = fused.attention.qkv_proj(x)
        rotated = qkv
        impl.ops.rope_and_write(qkv, positions, heads, planes, slot_mapping, rotated)
    query = rotated[:, : heads.query_size]
    key = rotated[:, heads.query_size : heads.query_size + heads.key_value_size]
    value = qkv[:, -heads.key_value_size :]
    query, key, value, output = (
        tensor.unflatten(1, (-1, heads.head_size)) for tensor in (query, key, value, output)
    )
    impl.forward(layer, query, key, value, kv_cache, metadata, output)


def _fused_attention_fake(x, positions, output, layer_name, is_projected):
    return


_library_name, _operator_name = FUSED_ATTENTION_OP.split("::")
_LIBRARY = Library(_library_name, "FRAGMENT")  # the operator lives as long as this
direct_register_custom_op(
    op_name=_operator_name,
    op_func=fused_attention,
    mutates_args=["output"],
    fake_impl=_fused_attention_fake,
    target_lib=_LIBRARY,
)
