"""`summary`: prints one architecture, layer by layer."""

import argparse

HELP = "one architecture, layer by layer: shapes, parameters, multiply-adds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `summary`."""
    add = parser.add_argument
    add("name", help="an architecture from `list`, or a JSON file of channels")
    add("--k", help="compression ratio of a Sc model, such as 8/3")
    add("--image-size", type=int, default=224, metavar="N", help="pixels a side (default: 224)")


def run(args: argparse.Namespace) -> None:
    """Prints the layers of one architecture as a tree."""
    from slimconv_jax.models.complexity import layers
    from slimconv_jax.models.zoo import abstract_model

    table = layers(abstract_model(args.name, k=args.k), args.image_size)
    row = "{:26} {:10} {:>14} {:>12} {:>14}"
    print(row.format("layer", "type", "output", "parameters", "MACs"))
    enclosing = []
    for layer in table:
        while enclosing and layer.path[: len(enclosing[-1])] != enclosing[-1]:
            enclosing.pop()
        part = ".".join(map(str, layer.path[len(enclosing[-1]) :])) if enclosing else args.name
        output = "x".join(map(str, layer.shape[1:]))
        part = "  " * len(enclosing) + part
        print(row.format(part, layer.type, output, f"{layer.params:,}", f"{layer.macs:,}"))
        enclosing.append(layer.path)
    print(
        f"\nFor one image of {args.image_size}x{args.image_size} pixels. The figures of a layer "
        "include those of its parts."
    )
