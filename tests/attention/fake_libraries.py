"""FlashAttention's, torch's and FlashInfer's calls over torch on a CPU, as strict as their documentation.

Each refuses what the real one refuses, and reads what the real one may read: of blocks whole entries of the table,
of version 3 without a table all tokens it is given. So a wrong length shows as NaN, a wrong type or shape at once.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

HALVES = (torch.float16, torch.bfloat16)


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    page_size: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[rows, heads, dim] of one sequence, in the query's type; the last row's own key is the last one.

    Args:
        sinks: [heads] logits that have no value.
        left, right: keys that a row sees before and behind its own; -1 for all.
        page_size: what no row sees is not multiplied if it lies in the first page.
    """
    num_rows, num_keys = len(query), len(keys)
    group = query.shape[1] // keys.shape[1]
    own = torch.arange(num_keys - num_rows, num_keys).unsqueeze(1)
    at = torch.arange(num_keys).unsqueeze(0)
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
    if left >= 0:
        seen &= at >= own - left
    if right >= 0:
        seen &= at <= own + right
    k, v = keys.float().repeat_interleave(group, 1), values.float().repeat_interleave(group, 1)
    hidden = ~seen.any(0) & (torch.arange(num_keys) < page_size)
    k[hidden], v[hidden] = 0, 0
    scores = torch.einsum("rhd,khd->hrk", query.float(), k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, num_rows, 1)), -1)
    weights = torch.softmax(scores, -1)[..., :num_keys]
    return torch.einsum("hrk,khd->rhd", weights, v).to(query.dtype)


def check_numbers(tensor: torch.Tensor, *shape: int) -> list[int]:
    """The numbers of a contiguous int32 tensor of this shape."""
    assert tensor.dtype == torch.int32
    assert tensor.is_contiguous()
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)
    return tensor.flatten().tolist()


def check_cache(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    assert query.dtype == keys.dtype == values.dtype
    assert query.dtype in HALVES
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert keys.shape == values.shape
    assert query.shape[-1] == keys.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] <= 256
    assert query.shape[-2] % keys.shape[-2] == 0


def paged(pool: torch.Tensor, blocks: list[int], num_keys: int) -> torch.Tensor:
    """A sequence's tokens, from whole entries of its table."""
    used = torch.tensor(blocks[: -(-num_keys // pool.shape[1])])
    return pool[used].flatten(0, 1)[:num_keys]


class FakeTorchFlash:
    """`torch.ops.aten._flash_attention_forward` of torch 2.12."""

    def __init__(self, *, takes_tables: bool = True) -> None:
        names = ["query", "key", "value", *(["block_table"] if takes_tables else [])]
        arguments = [SimpleNamespace(name=name) for name in names]
        self.default = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
        self.takes_tables = takes_tables
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        check_cache(query, key, value)
        assert dropout_p == 0.0
        assert not return_debug_mask
        count = len(seqused_k)
        rows = check_numbers(cum_seq_q, count + 1)
        firsts = check_numbers(cum_seq_k, count + 1)
        used = check_numbers(seqused_k, count)
        assert max(used) <= max_k
        assert max(b - a for a, b in pairwise(rows)) == max_q
        assert rows[0] == 0
        assert rows[-1] == len(query)
        outputs = []
        for i, num_keys in enumerate(used):
            if block_table is None:
                k, v = (x[firsts[i] : firsts[i] + num_keys] for x in (key, value))
            else:
                assert self.takes_tables
                assert key.shape[1] % 256 == 0
                check_numbers(block_table, count, block_table.shape[1])
                k, v = (paged(x, block_table[i].tolist(), num_keys) for x in (key, value))
            outputs.append(
                attention(
                    query[rows[i] : rows[i + 1]],
                    k,
                    v,
                    scale=scale,
                    left=window_size_left,
                    right=0 if is_causal and max_q > 1 else window_size_right,
                    softcap=0.0,
                    page_size=0 if block_table is None else key.shape[1],
                )
            )
        return torch.cat(outputs), *(torch.empty(0) for _ in range(4))


class FakeFlashAttention2:
    """The module `flash_attn`, version 2.8."""

    @staticmethod
    def flash_attn_with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor | None = None,
        cache_batch_idx: torch.Tensor | None = None,
        cache_leftpad: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float,
    ) -> torch.Tensor:
        check_cache(q, k_cache, v_cache)
        assert q.dim() == 4
        count = len(q)
        left, right = window_size
        outputs = []
        for i in range(count):
            num_keys = k_cache.shape[1] if cache_seqlens is None else check_numbers(cache_seqlens, count)[i]
            first = 0 if cache_leftpad is None else check_numbers(cache_leftpad, count)[i]
            if block_table is not None:
                assert cache_leftpad is None
                assert cache_batch_idx is None
                assert k_cache.shape[1] % 256 == 0
                check_numbers(block_table, count, block_table.shape[1])
                k, v = (paged(x, block_table[i].tolist(), num_keys) for x in (k_cache, v_cache))
            else:
                slot = i if cache_batch_idx is None else check_numbers(cache_batch_idx, count)[i]
                k, v = (x[slot, first:num_keys] for x in (k_cache, v_cache))
            outputs.append(
                attention(
                    q[i],
                    k,
                    v,
                    scale=softmax_scale,
                    left=left,
                    right=0 if causal else right,
                    softcap=softcap,
                    page_size=0 if block_table is None else k_cache.shape[1],
                )
            )
        return torch.stack(outputs)


class FakeFlashAttention3:
    """The module `flash_attn_interface`, version 3: what it is not given a table for it reads whole."""

    @staticmethod
    def flash_attn_with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float,
    ) -> torch.Tensor:
        check_cache(q, k_cache, v_cache)
        left, right = window_size
        right = 0 if causal else right
        if page_table is None:
            assert cache_seqlens is None, "it would read behind the sequence's end"
            assert len(q) == len(k_cache) == 1
            whole = attention(
                q[0], k_cache[0], v_cache[0], scale=softmax_scale, left=left, right=right, softcap=softcap
            )
            return whole.unsqueeze(0)
        assert cache_seqlens is not None
        assert cu_seqlens_q is not None
        count = len(cache_seqlens)
        used = check_numbers(cache_seqlens, count)
        rows = check_numbers(cu_seqlens_q, count + 1)
        assert max(b - a for a, b in pairwise(rows)) == max_seqlen_q
        check_numbers(page_table, count, page_table.shape[1])
        outputs = []
        for i, num_keys in enumerate(used):
            k, v = (paged(x, page_table[i].tolist(), num_keys) for x in (k_cache, v_cache))
            outputs.append(
                attention(
                    q[rows[i] : rows[i + 1]],
                    k,
                    v,
                    scale=softmax_scale,
                    left=left,
                    right=right,
                    softcap=softcap,
                    page_size=k_cache.shape[1],
                )
            )
        return torch.cat(outputs)


class FakeFlashAttention4:
    """The module `flash_attn.cute`: what it is given it reads whole."""

    @staticmethod
    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: torch.Tensor | None = None,
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, None]:
        assert softmax_scale is not None
        assert q.dim() == k.dim() == v.dim() == 4
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in HALVES
        assert len(q) == len(k) == len(v) == 1
        assert k.shape[:3] == v.shape[:3]
        for dim in (q.shape[3], v.shape[3]):
            assert dim % 8 == 0
            assert 8 <= dim <= 256
        if learnable_sink is not None:
            assert learnable_sink.shape == (q.shape[2],)
            assert learnable_sink.dtype in (*HALVES, torch.float32)
        left, right = (-1 if side is None else side for side in window_size)
        right = 0 if causal else right
        whole = attention(
            q[0], k[0], v[0], scale=softmax_scale, left=left, right=right, softcap=softcap, sinks=learnable_sink
        )
        return whole.unsqueeze(0), None


class _FakeWrapper:
    """What FlashInfer's wrappers for decoding and for prompts share; `plan` before `run`."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.nbytes >= 128 * 2**20
        assert kv_layout == "NHD"
        self._planned: dict[str, Any] | None = None

    def _plan(
        self,
        row_starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        heads: tuple[int, int, int],
        page_size: int,
        settings: dict[str, Any],
    ) -> None:
        count = len(last_page_len)
        starts = check_numbers(indptr, count + 1)
        last = check_numbers(last_page_len, count)
        entries = check_numbers(indices, starts[-1])
        assert all(1 <= number <= page_size for number in last)
        assert all(b > a for a, b in pairwise(starts))
        assert settings["q_data_type"] == settings["kv_data_type"]
        assert heads[2] in (64, 128, 256)
        self._planned = {
            "rows": check_numbers(row_starts, count + 1),
            "pages": [entries[a:b] for a, b in pairwise(starts)],
            "last": last,
            "heads": heads,
            "page_size": page_size,
            **settings,
        }

    def run(self, query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        plan = self._planned
        assert plan is not None, "plan first"
        keys, values = cache
        check_cache(query, keys, values)
        assert keys.stride() == values.stride()
        assert keys.stride(0) < 2**32
        assert keys.dtype == plan["q_data_type"]
        assert keys.shape[1] == plan["page_size"]
        assert (query.shape[1], keys.shape[2], keys.shape[3]) == plan["heads"]
        assert len(query) == plan["rows"][-1]
        outputs = []
        for i, (pages, last) in enumerate(zip(plan["pages"], plan["last"], strict=True)):
            num_keys = (len(pages) - 1) * plan["page_size"] + last
            outputs.append(
                attention(
                    query[plan["rows"][i] : plan["rows"][i + 1]],
                    paged(keys, pages, num_keys),
                    paged(values, pages, num_keys),
                    scale=plan["sm_scale"],
                    left=plan["window_left"],
                    right=0 if plan["causal"] else -1,
                    softcap=plan["logits_soft_cap"],
                    page_size=plan["page_size"],
                )
            )
        return torch.cat(outputs)


class BatchDecodeWithPagedKVCacheWrapper(_FakeWrapper):
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool = False
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self._use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        logits_soft_cap: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert self._use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 3, 4, 6, 8)
        rows = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        heads = num_qo_heads, num_kv_heads, head_dim
        settings = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
            "sm_scale": sm_scale,
            "causal": False,
        }
        self._plan(rows, indptr, indices, last_page_len, heads, page_size, settings)


class BatchPrefillWithPagedKVCacheWrapper(_FakeWrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        settings = {
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type,
            "kv_data_type": kv_data_type,
            "sm_scale": sm_scale,
            "causal": causal,
        }
        heads = num_qo_heads, num_kv_heads, head_dim_qk
        tables = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._plan(qo_indptr, *tables, heads, page_size, settings)


FLASHINFER = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
)
"""The module `flashinfer`, version 0.6."""
