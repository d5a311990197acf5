"""Makes a loaded model fast on this machine without touching its code: modules are replaced, each one verified."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from vattention.model.difference import TOLERANCE, largest_difference, row_difference
from vattention.model.fused import FusedGatedMLP, FusedRMSNorm, GatedMLP
from vattention.model.fused_attention import Notes, Projections, fuse
from vattention.model.hook import AttentionHook
from vattention.model.linear import LinearMethod, PackedLinear, is_plain_linear, standing_for
from vattention.model.linear_methods import fastest_method
from vattention.model.optimize_report import Account, OptimizeReport
from vattention.model.quantized import (
    QUANTIZATIONS,
    QuantizedEmbedding,
    QuantizedMethod,
    is_lookup,
    is_way_into_attention,
)
from vattention.model.row_kernels import RowKernels, row_kernels
from vattention.model.torch_linear import TorchLinear
from vattention.native.huge import HugeBlocks

_log = logging.getLogger(__name__)

_ROTATED = 2
"""Times the tolerance for queries and keys: modules round them after their norm, both products and the sum."""

_QUANTIZED = 2
"""Times the tolerance where weights are quantized: what they stand for is itself rounded, to be compared."""

_SAMPLED_OUTPUTS = 512
_PROGRESS_DELAY_S = 2.0


@torch.no_grad()
def optimize(model: nn.Module, quantization: str | None = None) -> OptimizeReport:
    """Replaces, in place, modules of a model by faster ones that compute the same.

    These are linear layers, gated feed-forward blocks, root mean square norms and the way into attention, where
    they have no hooks; a model on several devices stays as it is. A weight is dropped once its packed form is
    there, unless other modules share it, as embeddings tied to the output layer do. The model serves inference only
    afterwards: replacements have no gradients, and packed weights are not part of its state dict.

    Args:
        quantization: one of `QUANTIZATIONS`: all linear layers that can be replaced get weights in fewer bits, and
            an embedding tied to the output layer reads its copy. Replacements are then compared with the original
            modules on what the quantized weights stand for.
    """
    begin = time.perf_counter()
    account = Account(model)
    _Optimizer(model, quantization, account).run()
    return account.report(time.perf_counter() - begin)


class _Optimizer:
    """The state of one pass over a model."""

    def __init__(self, model: nn.Module, quantization: str | None, account: Account) -> None:
        self._model = model
        self._account = account
        self._quantization = None if quantization is None else QUANTIZATIONS[quantization]
        self._leeway = 1 if quantization is None else _QUANTIZED
        self._output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        devices = {parameter.device for parameter in model.parameters()}
        device = devices.pop() if len(devices) == 1 else None
        self._is_here = device is not None and device.type in ("cpu", "cuda")
        self._is_on_gpu = device is not None and device.type == "cuda"
        self._row_kernels = None if device is None else row_kernels(device)
        self._blocks = HugeBlocks()
        modules = list(model.modules())
        self._num_sites = Counter(id(child) for module in modules for child in module.children())
        self._notes: Notes | None = None
        self._several_sites: dict[nn.Module, nn.Module] = {}
        self._methods: dict[tuple[int, int, torch.dtype], type[LinearMethod]] = {}
        self._progress = tqdm(total=len(modules), desc="packing weights", delay=_PROGRESS_DELAY_S, leave=False)

    def run(self) -> None:
        with self._progress, self._noted():
            self._walk(self._model, "")

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Inside the block the model's attention takes notes, if it goes through transformers' interface."""
        if not isinstance(self._model, PreTrainedModel) or not self._model._can_set_attn_implementation():
            yield
            return
        self._notes = Notes()
        hook = AttentionHook(self._model, self._notes)
        try:
            yield
        finally:
            hook.close()

    def _walk(self, parent: nn.Module, prefix: str) -> None:
        """Goes down from parents to children, keeping no reference to a module once it is replaced."""
        self._progress.update()
        for attribute, child in list(parent.named_children()):
            name = f"{prefix}{attribute}"
            replacement = self._several_sites.get(child)
            if replacement is None:
                replacement = self._replacement(child, name)
                if replacement is child:
                    self._walk(child, f"{name}.")
                if self._num_sites[id(child)] > 1:
                    self._several_sites[child] = replacement
            if replacement is not child:
                setattr(parent, attribute, replacement)
            del child
        self._give_back()

    def _give_back(self) -> None:
        """Memory of dropped weights. torch would keep it for weights of the same size, of which no more come."""
        if self._is_on_gpu:
            torch.cuda.empty_cache()

    def _replacement(self, module: nn.Module, name: str) -> nn.Module:
        """A verified replacement, or the module itself."""
        if not self._is_here:
            return module
        if is_plain_linear(module):
            return self._linear(module, name)
        rows = self._row_kernels
        if rows is None or module._forward_hooks or module._forward_pre_hooks:
            return module
        mlp = GatedMLP.of(module)
        if mlp is not None and mlp.gate_proj.weight.dtype in rows.dtypes:
            return self._gated_mlp(rows, module, mlp, name)
        projections = Projections.of(module) if self._notes is not None else None
        if projections is not None and projections.q_proj.weight.dtype in rows.dtypes:
            self._attention(rows, module, projections, name)
            return module
        return self._rms_norm(rows, module, name)

    def _method(
        self, num_out: int, num_in: int, dtype: torch.dtype, *, delicate: bool = False
    ) -> type[LinearMethod]:
        if self._quantization is not None:
            return self._quantization.method(dtype, delicate=delicate)
        if self._is_on_gpu:
            return TorchLinear
        shape = (num_out, num_in, dtype)
        if shape not in self._methods:
            self._methods[shape] = fastest_method(*shape)
        return self._methods[shape]

    def _linear(self, linear: nn.Linear, name: str) -> nn.Module:
        if self._quantization is not None:
            delicate, output = is_way_into_attention(name), linear is self._output
            quantized = self._quantization.method(linear.weight.dtype, delicate=delicate, output=output)
            return self._quantized(quantized, linear, name)
        method = self._method(linear.out_features, linear.in_features, linear.weight.dtype)
        if method is TorchLinear:
            self._account.kept += 1
            return linear
        replacement = PackedLinear.of(linear, method, self._blocks.empty)
        difference = max(
            largest_difference(replacement, linear, linear.weight, rows=(1,)),
            self._sampled_difference(replacement, linear, lambda sample: linear.weight[sample], rows=(5, 64)),
        )
        return self._packed(linear, replacement, name, difference)

    def _quantized(self, method: type[QuantizedMethod], linear: nn.Linear, name: str) -> nn.Module:
        bias = None if linear.bias is None else linear.bias.detach()
        packed = method.pack(linear.weight.detach(), bias, self._blocks.empty)
        replacement = PackedLinear(packed, linear.in_features, linear.out_features)
        difference = self._sampled_difference(replacement, linear, packed.rows, rows=(1, 5, 64))
        result = self._packed(linear, replacement, name, difference)
        if linear is self._output and result is replacement:
            self._tied(linear, packed)
        return result

    def _sampled_difference(
        self,
        replacement: PackedLinear,
        linear: nn.Linear,
        weights: Callable[[Tensor], Tensor],
        rows: tuple[int, ...],
    ) -> float:
        """An output layer over a whole vocabulary takes seconds the old way: many rows see a sample of it."""
        generator = torch.Generator().manual_seed(0)
        sample = torch.randperm(linear.out_features, generator=generator)[:_SAMPLED_OUTPUTS]
        weight, bias = weights(sample), None if linear.bias is None else linear.bias[sample]
        return largest_difference(
            lambda x: replacement(x)[:, sample],
            lambda x: F.linear(x, weight, bias),
            linear.weight,
            rows=rows,
        )

    def _packed(self, linear: nn.Linear, replacement: PackedLinear, name: str, difference: float) -> nn.Module:
        if not self._accept(name, replacement.method.name, difference, linear.weight.dtype):
            return linear
        self._account.pack([linear.weight], replacement.method.nbytes)
        return replacement

    def _tied(self, linear: nn.Linear, method: QuantizedMethod) -> None:
        """An embedding with the output layer's weight reads its numbers from now on."""
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        if getattr(embedding, "weight", None) is not linear.weight or not is_lookup(embedding):
            return
        replacement = QuantizedEmbedding(embedding, method)
        self._model.set_input_embeddings(replacement)  # type: ignore[operator]
        self._account.replaced["embedding"] += 1

    def _gated_mlp(self, rows: RowKernels, module: nn.Module, mlp: GatedMLP, name: str) -> nn.Module:
        dtype = mlp.gate_proj.weight.dtype
        gate_up, down = (self._method(*shape, dtype) for shape in mlp.shapes)
        replacement = FusedGatedMLP(rows, mlp, gate_up, down, self._blocks.empty)
        with (
            standing_for(replacement.gate_up.method, mlp.gate_proj, mlp.up_proj),
            standing_for(replacement.down.method, mlp.down_proj),
        ):
            difference = largest_difference(replacement, module, mlp.gate_proj.weight)
        if not self._accept(name, "gated mlp", difference, dtype):
            return module
        weights = [part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        self._account.pack(weights, replacement.nbytes, merged_nbytes=replacement.gate_up.method.nbytes)
        return replacement

    def _attention(self, rows: RowKernels, module: nn.Module, parts: Projections, name: str) -> None:
        """Changes the module itself, for attention functions are given it and read its attributes."""
        assert self._notes is not None
        for attribute in ("q_norm", "k_norm"):
            norm = getattr(module, attribute, None)
            if isinstance(norm, nn.Module) and norm not in self._several_sites:
                self._several_sites[norm] = replacement = self._rms_norm(rows, norm, f"{name}.{attribute}")
                self._several_sites[replacement] = replacement
                setattr(module, attribute, replacement)
        dtype = parts.q_proj.weight.dtype
        method = self._method(*parts.shape, dtype, delicate=True)
        fused = fuse(rows, module, parts, method, self._notes, row_difference, self._blocks.empty)
        tolerance = self._leeway * _ROTATED * TOLERANCE[dtype]
        if fused is None or not fused[1] <= tolerance:
            # Other kinds of attention look like this one from outside, so there is nothing to warn of.
            _log.info("%s is no attention that can be fused", name)
            return
        self._account.replaced["attention"] += 1
        nbytes = fused[0].method.nbytes
        self._account.pack([part.weight for part in parts], nbytes, merged_nbytes=nbytes)
        fused[0].install()

    def _rms_norm(self, rows: RowKernels, module: nn.Module, name: str) -> nn.Module:
        guesses = list(FusedRMSNorm.guesses(rows, module))
        if not guesses:
            return module
        weight = guesses[0].weight
        dtype = weight.dtype
        differences = [largest_difference(guess, module, weight) for guess in guesses]
        best = min(range(len(guesses)), key=differences.__getitem__)
        return guesses[best] if self._accept(name, "rms norm", differences[best], dtype) else module

    def _accept(self, name: str, kind: str, difference: float, dtype: torch.dtype) -> bool:
        if difference <= self._leeway * TOLERANCE[dtype]:
            self._account.replaced[kind] += 1
            return True
        _log.warning("%s stays as it is: as %s it is off by %.2g of a row's largest number", name, kind, difference)
        self._account.refused.append(name)
        return False
