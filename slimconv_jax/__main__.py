"""The command line beside train.py: what models there are, what is in them, and exports."""

import argparse
import os
import sys

from slimconv_jax.errors import InputError
from slimconv_jax.models.complexity import count_macs, count_params, layers
from slimconv_jax.models.slimconv import k_from_reduction
from slimconv_jax.models.zoo import ARCHITECTURES, PUBLISHED, abstract_model, describe, list_models


def list_command(args: argparse.Namespace) -> None:
    """Prints every architecture, row by row as it is counted."""
    row = "{:22} {:>4} {:>12} {:>15}  {}"
    print(row.format("model", "k", "parameters", "MACs", "published"))
    for name in list_models():
        reduction = ARCHITECTURES[name].reduction
        ratios = [None if reduction is None else str(k_from_reduction(reduction))]
        ratios += [k for published, k in PUBLISHED if published == name and k not in ratios]
        for k in ratios:
            model = abstract_model(name, k=k)
            params, macs = f"{count_params(model):,}", f"{count_macs(model):,}"
            published = PUBLISHED.get((name, k), "")
            print(row.format(name, k or "-", params, macs, published).rstrip(), flush=True)
    print(
        "\n1000 classes, 224x224 pixels. MACs: multiply-adds of convolutions and matrix "
        "products,\nthe papers' \"FLOPs\". Published: the authors' parameters, MACs and "
        "ImageNet top-1; in\nparentheses a figure that does not follow from the architecture."
    )


def summary_command(args: argparse.Namespace) -> None:
    """Prints the layers of one architecture as a tree."""
    table = layers(abstract_model(args.name, k=args.k), args.image_size)
    row = "{:26} {:10} {:>14} {:>12} {:>14}"
    print(row.format("layer", "type", "output", "parameters", "MACs"))
    enclosing = []
    for layer in table:
        while enclosing and layer.path[: len(enclosing[-1])] != enclosing[-1]:
            enclosing.pop()
        name = ".".join(map(str, layer.path[len(enclosing[-1]) :])) if enclosing else args.name
        output = "x".join(map(str, layer.shape[1:]))
        name = "  " * len(enclosing) + name
        print(row.format(name, layer.type, output, f"{layer.params:,}", f"{layer.macs:,}"))
        enclosing.append(layer.path)
    print(
        f"\nFor one image of {args.image_size}x{args.image_size} pixels; the figures of a layer "
        "include those of its parts."
    )


def export_command(args: argparse.Namespace) -> None:
    """Writes a saved model in a format for other programs."""
    # Imported here since they take seconds.
    from slimconv_jax.saving import load_model
    from slimconv_jax.torch_interop.checkpoint_file import write_checkpoint
    from slimconv_jax.torch_interop.convert import to_torch

    model = load_model(args.model)
    state_dict = to_torch(model)
    write_checkpoint(state_dict, args.output, overwrite=args.overwrite)
    print(
        f"wrote {args.output}: {describe(model.config)}, {len(state_dict)} tensors; in PyTorch:\n"
        f'  net.load_state_dict(torch.load("{args.output}"))'
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m slimconv_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "list", help="every architecture: k, parameters, multiply-adds, published figures"
    )
    command.set_defaults(run=list_command)

    command = commands.add_parser(
        "summary", help="one architecture, layer by layer: shapes, parameters, multiply-adds"
    )
    command.add_argument("name", help="an architecture, as `list` names it")
    command.add_argument("--k", help="compression ratio of a Sc model, such as 8/3")
    command.add_argument(
        "--image-size", type=int, default=224, metavar="N", help="pixels a side (default: 224)"
    )
    command.set_defaults(run=summary_command)

    command = commands.add_parser("export", help="a saved model, for other programs")
    command.add_argument("model", metavar="MODEL", help="a directory of save_model")
    command.add_argument("output", metavar="OUT", help="the new file")
    command.add_argument(
        "--format",
        choices=["torch"],
        required=True,
        help="torch: a state dict with the names of the released files",
    )
    command.add_argument("--overwrite", action="store_true", help="replace a file at OUT")
    command.set_defaults(run=export_command)

    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough, as in `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
