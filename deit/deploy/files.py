"""Networks as files of ONNX and torch.export, and these files run as networks."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from deit.errors import UserError, one_line

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# torch 2.6 fixes the batch of linear layers, and writes shapes that the quantiser refuses
ANY_BATCH_IN_ONNX = hasattr(torch.compiler, "is_exporting")
INPUT, OUTPUT = "images", "logits"
METADATA_FILE = "metadata.json"
SINGLE_FILE_BYTES = 2**31 - 2**20  # protobuf's limit, and room for the graph

# what `quantize_onnx` does, for a file's metadata
QUANTIZATION = {"weights": "int8", "activations": "uint8", "operations": ["MatMul", "Gemm", "Conv"]}

Runner = Callable[[Tensor], Tensor]


def require_onnx(*packages: str) -> None:
    """Raise UserError unless `packages` (default: all that export needs) are installed."""
    missing = []
    for name in packages or PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(
            f"ONNX needs {' and '.join(missing)}: pip install '.[deploy]' "
            "(or -r requirements-deploy.txt)"
        )


class OnnxNetwork:
    """An ONNX file in ONNX Runtime: images (B, 3, H, W) to logits (B, K), float32 on the CPU.

    Attributes:
        batch: the number of images that it takes at once, None for any.
        metadata: names to texts.

    Raises:
        UserError: the file is not there or no network, or the device cannot be used.
    """

    def __init__(self, path: str | Path, device: str = "cpu", threads: int | None = None) -> None:
        require_onnx("onnxruntime")
        import onnxruntime

        if not Path(path).is_file():
            raise UserError(f"no ONNX file at {str(path)!r}")
        provider = f"{device.upper()}ExecutionProvider"
        if device not in ("cpu", "cuda") or provider not in onnxruntime.get_available_providers():
            raise UserError(f"this ONNX Runtime does not run on {device!r}: use --device cpu")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # its exceptions have no common type
            raise UserError(f"ONNX Runtime cannot open {str(path)!r}: {one_line(error)}") from error
        (first, *others), outputs = self._session.get_inputs(), self._session.get_outputs()
        if others or len(outputs) != 1 or len(first.shape) != 4:
            raise UserError(f"{str(path)!r} is no classifier of images: it needs one input "
                            "(B, 3, H, W) and one output")  # fmt: skip
        self._name = first.name
        self._dtype = torch.float16 if first.type == "tensor(float16)" else torch.float32
        self.shape = tuple(first.shape)
        self.batch = first.shape[0] if isinstance(first.shape[0], int) else None
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def __call__(self, images: Tensor) -> Tensor:
        count = len(images)
        if self.batch is not None:  # pad what does not fill its batch
            missing = -count % self.batch
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        logits = []
        for part in images.split(self.batch or max(len(images), 1)):
            feed = {self._name: part.cpu().to(self._dtype).numpy()}
            logits.append(torch.from_numpy(self._session.run(None, feed)[0]).float())
        return torch.cat(logits)[:count]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of exporters, which are about their own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _dynamic(dynamic: bool) -> tuple[dict[int, torch.export.Dim]] | None:
    return ({0: torch.export.Dim("batch", min=1, max=2**31 - 1)},) if dynamic else None


def write_onnx(
    network: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    *,
    dynamic: bool,
    opset: int | None,
) -> Runner:
    """Write `network` to `path`, with its weights beside it if they exceed 2 GB; run the file.

    The example says the shape and the dtype. The notes that the exporter leaves at each node are
    taken out: they hold paths of this machine.
    """
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    with _quiet():
        program = torch.onnx.export(
            network, (example,), dynamo=True, verbose=False, input_names=[INPUT],
            output_names=[OUTPUT], dynamic_shapes=_dynamic(dynamic), opset_version=opset,
        )  # fmt: skip
        found = program.model.opset_imports.get("")
        if opset not in (None, found):
            raise UserError(f"--opset {opset} cannot be written, opset {found} can: omit it")
        program.save(str(path), external_data=size > SINGLE_FILE_BYTES)
    _describe_onnx(path, metadata)
    return OnnxNetwork(path)


def _describe_onnx(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace a file's metadata, without its weights beside it, and check it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for item in (*model.graph.node, *model.graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def quantize_onnx(
    path: Path, batches: Iterable[Tensor] | None, metadata: Mapping[str, str]
) -> OnnxNetwork:
    """Replace a file of `write_onnx` by one with products in int8; run it.

    Linear layers and dense convolutions are quantised, by output channel where ONNX can. Norms,
    softmax, products of activations and depthwise convolutions stay in float32: they lose much,
    and are a small part of the work.

    Args:
        batches: images as the file takes them, whose ranges of values are kept (static); None for
            ranges that each batch has anew (dynamic).
    """
    import onnx
    from onnxruntime import quantization

    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    kept = [
        node.name
        for node in graph.node
        if (node.op_type == "MatMul" and node.input[1] not in weights)
        or any(entry.name == "group" and entry.i > 1 for entry in node.attribute)
    ]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _quiet():
        parts = [file for file in path.parent.iterdir() if file.is_file()]
        for file in parts:
            file.rename(Path(folder) / file.name)
        options = dict(
            op_types_to_quantize=QUANTIZATION["operations"], nodes_to_exclude=kept,
            per_channel=True, weight_type=quantization.QuantType.QInt8,
            use_external_data_format=len(parts) > 1,
            # what products give is read by operations in float
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )  # fmt: skip
        quantize = quantization.quantize_dynamic
        if batches is not None:
            feeds = iter({INPUT: images.numpy()} for images in batches)
            reader = SimpleNamespace(get_next=lambda: next(feeds, None))
            options |= {"activation_type": quantization.QuantType.QUInt8}
            quantize = partial(quantization.quantize_static, calibration_data_reader=reader)
        quantize(Path(folder) / path.name, path, **options)
    _describe_onnx(path, metadata)
    for file in path.parent.iterdir():
        file.chmod(path.stat().st_mode)  # the quantiser keeps weights beside it from others
    return OnnxNetwork(path)


def write_torch_export(
    network: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    *,
    dynamic: bool,
    opset: int | None = None,
) -> Runner:
    """Write `network` as a program of torch.export, with `metadata.json` in it; run the file."""
    with _quiet():
        program = torch.export.export(network, (example,), dynamic_shapes=_dynamic(dynamic))
        extra = {METADATA_FILE: json.dumps(dict(metadata))}
        file = io.BytesIO()  # where the disk is full, torch's own writer aborts the process
        torch.export.save(program, file, extra_files=extra)
        path.write_bytes(file.getbuffer())
        loaded = torch.export.load(str(path)).module()
    return lambda images: loaded(images.to(example.dtype)).float()


FORMATS = {"onnx": write_onnx, "torch-export": write_torch_export}
