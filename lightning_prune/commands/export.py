"""``lightning-prune export``: a network, whole or compact, as an ONNX or torch.export file, compared with it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.commands.target import add_target_arguments, load_target
from lightning_prune.errors import ConfigError
from lightning_prune.export import export_onnx, export_program


def main(arguments: Sequence[str]) -> None:
    """Build the network, load its weights, write the file and say what was compared.

    Raises:
        ConfigError: An option that does not fit, or a package that is missing.
        ExportError: The network cannot be exported, or the file computes something else.
    """
    parser = argparse.ArgumentParser("lightning-prune export", description=__doc__)
    add_target_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="NAME.onnx, or NAME.pt2 for a torch.export program"
    )
    parser.add_argument("--opset", type=int, help="ONNX operator set (default: torch's)")
    parser.add_argument("--dynamic-batch", action="store_true", help="inputs of any batch size")
    given = parser.parse_args(arguments)
    output = Path(given.output)
    if output.suffix not in (".onnx", ".pt2"):
        raise ConfigError(f"--output {output}: expected a name that ends in .onnx or .pt2, which says what to write.")
    if given.opset is not None and output.suffix != ".onnx":
        raise ConfigError("--opset belongs to ONNX files; leave it out for a .pt2 file.")
    model, inputs = load_target(given)
    if output.suffix == ".onnx":
        report = export_onnx(model, output, inputs, opset=given.opset, dynamic_batch=given.dynamic_batch)
    else:
        report = export_program(model, output, inputs, dynamic_batch=given.dynamic_batch)
    what = f"ONNX, operator set {report.opset}" if report.kind == "onnx" else "torch.export program"
    print(f"{output}: {what}, {report.size:,} bytes")
    print(
        f"equal to the model within {report.error:.1e} of its outputs' scale at batch sizes "
        f"{', '.join(map(str, report.batches))}"
    )
