"""`list`: prints every architecture and its counts, or the published comparison."""

import argparse

HELP = "every architecture: k, parameters, multiply-adds, published figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `list`."""
    parser.add_argument(
        "--published",
        action="store_true",
        help="the paper's comparison instead: published and counted parameters and FLOPs, error",
    )


def run(args: argparse.Namespace) -> None:
    """Prints every architecture, or the published comparison."""
    (print_published if args.published else print_architectures)()


def print_architectures() -> None:
    """Prints every architecture, row by row as it is counted."""
    from slimconv_jax.models.complexity import count_macs, count_params
    from slimconv_jax.models.published import IMAGENET, printed
    from slimconv_jax.models.slimconv import k_from_reduction
    from slimconv_jax.models.zoo import ARCHITECTURES, abstract_model, list_models, parse_model

    published = {parse_model(row.model): row for row in IMAGENET if row.model}
    line = "{:22} {:>4} {:>12} {:>15}  {}"
    print(line.format("model", "k", "parameters", "MACs", "published"))
    for name in list_models():
        reduction = ARCHITECTURES[name].reduction
        ratios = [None if reduction is None else str(k_from_reduction(reduction))]
        ratios += [k for other, k in published if other == name and k not in ratios]
        for k in ratios:
            model = abstract_model(name, k=k)
            params, macs = count_params(model), count_macs(model)
            figures = ""
            if row := published.get((name, k)):
                flops = f"{row.macs} G" if printed(macs, "macs") == row.macs else f"({row.macs} G)"
                figures = f"{row.params} M, {flops}, top-1 error {row.top1_error} %"
            cells = line.format(name, k or "-", f"{params:,}", f"{macs:,}", figures)
            print(cells.rstrip(), flush=True)
    print(
        "\n1000 classes, 224x224 pixels. MACs: multiply-adds of convolutions and matrix "
        "products,\nthe papers' \"FLOPs\". Published: the authors' parameters, MACs and "
        "ImageNet top-1 error. A figure\nin parentheses does not follow from the architecture."
    )


def print_published() -> None:
    """Prints the published comparison, each row beside the counts of the model here."""
    from slimconv_jax.models.complexity import count_macs, count_params
    from slimconv_jax.models.published import IMAGENET, printed
    from slimconv_jax.models.zoo import abstract_model, parse_model

    line = "{:27} {:>9} {:>11} {:>9} {:>14} {:>8}  {}"
    print(line.format("", "params, M", "counted", "FLOPs, G", "counted", "error, %", "here"))
    for row in IMAGENET:
        params = macs = "-"
        here = "found by a search, not published"
        if row.model:
            name, k = parse_model(row.model)
            model = abstract_model(name, k=k)
            counted = {"params": count_params(model), "macs": count_macs(model)}
            params, macs = (f"{value:,}" for value in counted.values())
            here = name + (f" --k {k}" if k else "")
            differing = [
                f"{words} would be {printed(counted[field], field)}"
                for field, words in (("params", "parameters"), ("macs", "FLOPs"))
                if printed(counted[field], field) != getattr(row, field)
            ]
            if differing:
                here += f"; differs: {', '.join(differing)}"
        error = f"{row.top1_error:.2f}"
        print(line.format(row.system, row.params, params, row.macs, macs, error, here), flush=True)
    print(
        "\nImageNet, 224x224 pixels. FLOPs: multiply-adds of convolutions and matrix products. "
        "Error: top-1,\nas published; nothing here was trained on ImageNet. The counts agree with "
        "the published figures to the\nlast printed digit, unless the row says that they differ. "
        "22.77 % is most likely the result of a\ncosine schedule: until June 2020 the authors' "
        "table had 23.29 %, and they released weights of both."
    )
