"""The commands on models: inspect, pack, prune, unpack, export, diff."""

import errno
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from fastopt._text import pattern_proposal, proposal, size_text
from fastopt._types import Notify
from fastopt.cli import page, tables
from fastopt.cli.app import Json, byte_progress, command, say
from fastopt.cli.evaluate import Budget, Chart, Eval, Evaluations, Minimize, State, searched
from fastopt.cli.options import (
    BUDGETS,
    CHOOSING,
    ONNX,
    QUANTIZING,
    DryRun,
    Exclude,
    Fit,
    Html,
    Include,
    Key,
    MinSize,
    Pattern,
    Preset,
    Skip,
    Source,
    Sparsity,
    Target,
    Threshold,
    given,
    given_to_format,
    group_size_of,
    of_format,
    overrides_of,
    usage,
    with_options,
)
from fastopt.cli.workers import Dask, Workers, executor_of
from fastopt.files.shards import read_index
from fastopt.files.sources import is_torch, open_weights
from fastopt.files.weights import Weights, is_packed
from fastopt.formats import FORMATS, with_network
from fastopt.formats import export as export_to
from fastopt.formats.onnx_calibrate import calibrate_onnx
from fastopt.formats.onnx_check import OutputReport, check_onnx
from fastopt.formats.onnx_pack import pack_onnx
from fastopt.models.calibration import Calibration
from fastopt.models.examine import diff as difference_of
from fastopt.models.examine import difference_by, facts_by
from fastopt.models.examine import inspect as facts_of
from fastopt.models.folders import file_to_write
from fastopt.models.model import NOT_PACKED, PackedModel, load, open_model
from fastopt.models.recipe import Recipe, read_recipe, with_preset
from fastopt.models.report import Report
from fastopt.models.stream import pack_file, unpack_file
from fastopt.progress import Progress
from fastopt.tensors.packed import Weight


@command(
    epilog="Examples:\n\nfastopt inspect model.safetensors\n\n"
    "fastopt inspect small.safetensors --json | jq '.tensors[] | select(.outliers > 0) | .name'"
)
def inspect(
    model: Source,
    key: Key = None,
    skip: Skip = None,
    workers: Workers = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Show the tensors of a model: size, range, zeros, outliers, and how many bits are enough.

    Outliers are more than 6 standard deviations away from the mean. The suggestion is the lowest bit width whose root
    mean square error at the default group size is below 12 % of the tensor. For a packed model, also show how each
    tensor is stored, and the recipe.

    JSON: file, recipe, tensors (name, kind, bits, group_size, param_bits, shape, dtype, size, nbytes, bits_per_weight,
    minimum, maximum, mean, std, zeros, outliers, non_finite, suggested_bits).
    """
    with executor_of(workers, dask) as executor, byte_progress("inspect") as notify:
        opened = open_model(model, key=key, skip=skip or ())
        if executor is None:
            facts = facts_of(_Watched(opened, notify))
        else:
            facts = facts_by(executor, open_weights(model, key=key, skip=skip or ()), notify)
    recipe = opened.recipe if isinstance(opened, PackedModel) else None
    if as_json:
        told = {"file": str(model), "recipe": recipe and recipe.to_dict(), "tensors": facts}
        typer.echo(tables.to_json(told))
    else:
        tables.print_facts(model, facts, recipe)


@command(
    epilog="Examples:\n\n"
    "fastopt pack model.safetensors -o small.safetensors --bits 4 --exclude '*norm*' --override '*embed*:bits=8'\n\n"
    "fastopt pack model.safetensors -o small.safetensors --bits 4 --group-size row --fit lsq --outliers 1e-4\n\n"
    "fastopt pack model.safetensors -o small.safetensors --target-size 12MB --html report.html\n\n"
    "fastopt pack model.safetensors -o small.safetensors --sparsity 0.5 --bits 8 --dry-run\n\n"
    "fastopt pack model_in_shards/ -o packed/model.safetensors.index.json --recipe recipe.toml\n\n"
    "fastopt pack huggingface_model/ -o packed/ --bits 4\n\n"
    "fastopt pack model.onnx -o small.onnx --bits 4 --fast\n\n"
    "fastopt pack model.onnx -o small.onnx --eval 'python score.py {}' --budget 1% --state search.json"
)
@with_options(*(p for p in of_format("onnx", panel=ONNX) if p.name not in ("graph", "input_shape")))
def pack(
    model: Source,
    output: Target,
    preset: Annotated[
        Preset | None,
        typer.Option(
            rich_help_panel=QUANTIZING,
            help="Options in one word: safe takes some 8.5 bits a weight, balanced 5.4, small 4.4. Options that are "
            "given beside it count.",
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(metavar="8|6|5|4|3|2", rich_help_panel=QUANTIZING, help="Quantize to this bit width.")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="N|row|tensor",
            rich_help_panel=QUANTIZING,
            help="Number of weights that share a scale and a minimum; by default a row at 8 bits, 32 at 4, 64 at 2.",
        ),
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(
            rich_help_panel=QUANTIZING,
            help="minmax: cover the range of a group; lsq: minimize the squared error; gptq: minimize that of the "
            "outputs, with --calibration of products. By default lsq below 4 bits or with --calibration, else minmax.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=QUANTIZING,
            help="Make the errors of outputs small for the inputs that `fastopt calibrate` saw.",
        ),
    ] = None,
    bias_correction: Annotated[
        bool,
        typer.Option(
            "--bias-correction",
            rich_help_panel=QUANTIZING,
            help="With --calibration, not for ONNX: add to each bias what its weight loses on average.",
        ),
    ] = False,
    outliers: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=QUANTIZING, help="Fraction of the weights, those with the largest error, to store exactly."
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            metavar="magnitude",
            rich_help_panel=QUANTIZING,
            help="Count errors of large weights more; needs no data. Implies --fit lsq.",
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", rich_help_panel=QUANTIZING, help="float16 or float32: the dtype of scale and minimum."
        ),
    ] = None,
    param_bits: Annotated[
        int | None,
        typer.Option(
            metavar="4|6|8",
            rich_help_panel=QUANTIZING,
            help="Store scale and minimum of a group as codes of so many bits, under a few floats for a row: less "
            "error at equal bytes. Groups are then 16 weights by default.",
        ),
    ] = None,
    param_group: Annotated[
        int | None,
        typer.Option(
            metavar="256",
            rich_help_panel=QUANTIZING,
            help="With --param-bits: these floats for 256 weights, as GGUF's K-quants have.",
        ),
    ] = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    pattern: Pattern = None,
    include: Include = None,
    exclude: Exclude = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB:...",
            rich_help_panel=CHOOSING,
            help="Other options for tensors whose names match, as GLOB:OPTION=VALUE,...: bits, group_size, "
            "param_dtype, param_bits, param_group, fit, outliers, importance, sparsity, threshold, pattern. May be "
            "repeated; the first pattern that matches counts.",
        ),
    ] = None,
    min_size: MinSize = None,
    key: Key = None,
    skip: Skip = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Read these options, and a table of overrides, from a TOML file. An option given here replaces that "
            "of the file; an --override comes before the overrides of the file."
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=BUDGETS,
            help="Choose the bits of each tensor by measured error, to reach this average number of bits per weight.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=BUDGETS,
            help="Choose bits likewise, to reach this file size, such as 12MB or 11.5MiB.",
        ),
    ] = None,
    evaluate: Eval = None,
    budget: Budget = None,
    minimize: Minimize = False,
    evaluations: Evaluations = None,
    state: State = None,
    chart: Chart = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            rich_help_panel=ONNX,
            help="onnx: run both models in ONNX Runtime and show how far their outputs are apart.",
        ),
    ] = False,
    check_inputs: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=ONNX,
            help="onnx, with --check: a .npz file with an array for each input; random ones by default.",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRun = False,
    workers: Workers = None,
    dask: Dask = None,
    html: Html = None,
    as_json: Json = False,
    **of_onnx: Any,
) -> None:
    """Pack a model: quantize it to 8, 6, 5, 4, 3 or 2 bits, prune it, or both, tensor by tensor.

    Only one tensor is in memory at a time. The report says which tensors were kept unchanged, and why. The recipe is
    stored in the file.

    With --eval, your own score of the whole model decides about the bits: each tensor is packed alone and scored once,
    then a few whole models are. The table of what was tried goes to stderr.

    An ONNX model is packed to another ONNX model, which runs as before: the weights of its MatMul, Gemm, Conv,
    ConvTranspose, Gather, LSTM, GRU, RNN and Einsum nodes are packed. This needs the extra export. Operator set and IR
    version are raised to those that have low-bit types.

    JSON: source, target, dry_run, file_bytes, nbytes_before, nbytes, bits_per_weight, recipe, error (rmse, relative,
    max, snr, cosine), tensors (name, shape, dtype, kind, bits, group_size, density, bits_per_weight, nbytes_before,
    nbytes, error, reason, output_error, param_bits); with --check, outputs (name, shape, error, same_top).
    """
    options = given(
        bits=bits,
        fit=fit and fit.value,
        outliers=outliers,
        importance=importance,
        param_dtype=param_dtype,
        param_bits=param_bits,
        param_group=param_group,
        sparsity=sparsity,
        threshold=threshold,
        pattern=pattern,
        include=include,
        exclude=exclude,
        min_size=min_size,
        bias_correction=bias_correction or None,
    )
    is_onnx = output.suffix == ".onnx"
    if group_size is not None:
        options["group_size"] = group_size_of(group_size)
    if preset is not None:
        options = with_preset({"preset": preset.value, **options}, onnx=is_onnx)
    base = Recipe() if recipe is None else read_recipe(recipe, onnx=is_onnx)
    overrides = overrides_of(override or ())
    with usage():
        # A key that is there twice keeps its first place, and must keep its first value too.
        later = {pattern: changes for pattern, changes in base.overrides.items() if pattern not in overrides}
        known = None if calibration is None else Calibration.load(calibration)
        wanted = base.replace(**options, overrides={**overrides, **later}, calibration=known)
    if target_bits is not None and target_size is not None:
        raise typer.BadParameter("--target-bits and --target-size: expected one of them")
    if evaluate is None and (budget is not None or minimize or evaluations or state or chart):
        raise typer.BadParameter("--budget, --minimize, --evaluations, --state, --chart: expected together with --eval")
    onnx = given_to_format(of_onnx)
    if evaluate is not None:
        if budget is None:
            raise typer.BadParameter("--eval: expected --budget beside it")
        if wanted.bits is not None or target_bits is not None or target_size is not None:
            raise typer.BadParameter("--eval: searches bits, so --bits and targets cannot be given beside it")
        if key is not None or skip:
            raise typer.BadParameter("--key, --skip: not with --eval; use --exclude")
        _check_outputs(None if is_onnx else output, html)
        _check_folders(output, chart)
        extra = {"evaluations": evaluations} if evaluations else {}
        wanted = searched(
            model, output, wanted, evaluate, chart, onnx, budget=budget, minimize=minimize, state=state, **extra
        )
    if (target_bits is not None or target_size is not None) and wanted.bits is not None:
        raise typer.BadParameter("--bits: chosen by --target-bits or --target-size, not given beside it")
    weights = None if is_onnx else open_weights(model, key=key, skip=skip or ())
    asked = wanted.bits or wanted.prunes or wanted.overrides or target_bits is not None or target_size is not None
    # Packed tensors of another format, as GGUF has them, become those of a file of fastopt without any option.
    if not asked and not (weights is not None and any(is_packed(weights, name) for name in weights)):
        raise typer.BadParameter(
            "nothing to do: expected --bits, --preset, --sparsity, --target-size, --recipe or the like"
        )
    targets = {"target_bits": target_bits, "target_size": target_size}
    if is_onnx:
        if check_inputs is not None and not check:
            raise typer.BadParameter("--check-inputs: expected together with --check")
        if check and (dry_run or output.resolve() == model.resolve()):
            raise typer.BadParameter("--check: compares two files, without --dry-run and with another --output")
        _refuse_parts(key, skip, workers, dask)
        checked = check_inputs if check_inputs is not None else check
        _pack_onnx(model, output, wanted, dry_run, html, as_json, checked, **targets, **onnx)
        return
    if onnx or check or check_inputs is not None:
        raise typer.BadParameter("--fast, --accuracy-level, --check: for an ONNX model only")
    assert weights is not None
    with executor_of(workers, dask) as executor:
        _pack(model, weights, output, wanted, dry_run, html, as_json, executor, **targets)


@command(
    epilog="Examples:\n\nfastopt calibrate model.onnx --data inputs.npz -o calib.safetensors\n\n"
    "fastopt pack model.onnx -o small.onnx --bits 4 --calibration calib.safetensors"
)
def calibrate(
    model: Source,
    data: Annotated[Path, typer.Option(help="A .npz file with an array for each input; 32 rows are run at a time.")],
    output: Target,
    products: Annotated[
        bool, typer.Option("--products", help="Also sum the products of inputs, which --fit gptq needs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run an ONNX model, and sum over the inputs of its weights, for fastopt pack --calibration.

    Weights of MatMul, Gemm and Conv nodes are calibrated, and those of LSTM, GRU and RNN nodes that multiply their
    inputs. This needs the extra export and onnxruntime.

    JSON: source, target, weights (name: rows, columns).
    """
    _check_outputs(output)
    calib = calibrate_onnx(model, data, products=products)
    calib.save(output)
    if as_json:
        weights = {name: {"rows": sums.rows, "columns": sums.columns} for name, sums in calib.items()}
        typer.echo(tables.to_json({"source": str(model), "target": str(output), "weights": weights}))
    else:
        say(f"{output}: {calib!r}")


@command(
    epilog="Examples:\n\nfastopt prune model.safetensors -o pruned.safetensors --sparsity 0.5\n\n"
    "fastopt prune model.safetensors -o pruned.safetensors --pattern 2:4 --exclude '*embed*'"
)
def prune(
    model: Source,
    output: Target,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    pattern: Pattern = None,
    include: Include = None,
    exclude: Exclude = None,
    min_size: MinSize = None,
    key: Key = None,
    skip: Skip = None,
    dry_run: DryRun = False,
    workers: Workers = None,
    dask: Dask = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Prune the weights of a model by magnitude, and store the remaining ones sparse.

    To quantize the remaining weights too, give the same options and --bits to fastopt pack. fastopt unpack turns the
    result into dense tensors with zeros. JSON: the same as for fastopt pack.
    """
    options = given(
        sparsity=sparsity, threshold=threshold, pattern=pattern, include=include, exclude=exclude, min_size=min_size
    )
    with usage():
        recipe = Recipe(**options)
    if not recipe.prunes:
        raise typer.BadParameter("expected --sparsity, --threshold or --pattern")
    if output.suffix == ".onnx":
        _refuse_parts(key, skip, workers, dask)
        _pack_onnx(model, output, recipe, dry_run, html, as_json)
    else:
        with executor_of(workers, dask) as executor:
            weights = open_weights(model, key=key, skip=skip or ())
            _pack(model, weights, output, recipe, dry_run, html, as_json, executor)


@command(
    epilog="Examples:\n\nfastopt unpack small.safetensors -o back.safetensors\n\n"
    "fastopt unpack model.npz -o model.safetensors"
)
def unpack(
    model: Source,
    output: Target,
    key: Key = None,
    skip: Skip = None,
    workers: Workers = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Convert a packed model, or one in another format, to plain tensors that every safetensors reader can read.

    Tensors get their original shapes and dtypes. JSON: source, target, file_bytes.
    """
    _check_outputs(output)
    weights = open_weights(model, key=key, skip=skip or ())
    with executor_of(workers, dask) as executor, byte_progress("unpack") as notify:
        unpack_file(weights, output, notify=notify, executor=executor)
    output = file_to_write(weights, output)
    size = _file_bytes(output)
    if as_json:
        typer.echo(tables.to_json({"source": str(model), "target": str(output), "file_bytes": size}))
    else:
        say(f"{output}: {size_text(size)}")


@command(
    epilog="Examples:\n\nfastopt export small.safetensors --to gguf -o small.gguf\n\n"
    "fastopt pack llm.gguf -o llm.safetensors --bits 4 && fastopt export llm.safetensors --to gguf -o llm4.gguf\n\n"
    "fastopt export small.safetensors --to onnx -o small.onnx --layer fc1:relu --layer fc2 --fast\n\n"
    "fastopt export net.onnx --to c -o net.c --dry-run\n\n"
    "fastopt export small.safetensors --to mlx -o mlx.safetensors --param-dtype float16"
)
@with_options(*of_format(*FORMATS))
def export(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="The format to write. " + "; ".join(f"{name}: {module.SUMMARY}" for name, module in FORMATS.items()),
            autocompletion=lambda: list(FORMATS),
            show_default=False,
        ),
    ],
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave out tensors whose names match; may be repeated.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Replace a text in all names; may be repeated, in this order."),
    ] = None,
    key: Key = None,
    skip: Skip = None,
    as_json: Json = False,
    **of_formats: Any,
) -> None:
    """Write a packed model in the format of another runtime.

    Codes, scales and minima are copied unchanged. A tensor that the format cannot hold is an error that says what to
    change.

    An ONNX model becomes a function in C, or is refused by the node that has none. Activations: relu, relu6,
    leaky_relu, gelu, silu, tanh, sigmoid, softmax. JSON: source, target, to, file_bytes; for networks in C cost.
    """
    if to not in FORMATS:
        raise typer.BadParameter(f"--to: expected one of {', '.join(FORMATS)}, got {to!r}{proposal(to, FORMATS)}")
    options = given_to_format(of_formats)
    for text in rename or ():
        if "=" not in text:
            raise typer.BadParameter(f"--rename: expected OLD=NEW, got {text!r}")
    names = {old: new for old, _, new in (text.partition("=") for text in rename or ())}
    with byte_progress("export") as notify:
        opened = open_model(model, key=key, skip=skip or ())
        options = with_network(to, model, options)
        cost = export_to(opened, output, to=to, exclude=exclude or (), rename=names, notify=notify, **options)
    about: dict[str, Any] = {"source": str(model), "target": str(output), "to": to}
    if cost is not None:
        about["cost"] = {**cost._asdict(), "steps": [step._asdict() for step in cost.steps]}
    if options.get("dry_run"):
        assert cost is not None
        typer.echo(tables.to_json(about) if as_json else tables.cost_table(cost))
        return
    size = _file_bytes(output)
    if as_json:
        typer.echo(tables.to_json({**about, "file_bytes": size}))
    else:
        say(f"{output}: {size_text(size)}")


@command(
    epilog="Examples:\n\nfastopt diff model.safetensors small.safetensors\n\n"
    "fastopt diff model.safetensors small.safetensors --max-error 0.1 || echo too far off"
)
def diff(
    first: Source,
    second: Annotated[Path, typer.Argument(help="The model to compare with it, in any of these formats.")],
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with code 1 if a tensor has a larger relative error than this, or if names or shapes differ.",
            show_default=False,
        ),
    ] = None,
    key: Key = None,
    skip: Skip = None,
    workers: Workers = None,
    dask: Dask = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show the differences between the decoded tensors of two models, and the tensors that only one of them has.

    Errors are those of the second model: root mean square relative to the first, largest, signal-to-noise ratio, and
    cosine. The exit code is 0 whatever the differences are, unless --max-error is given.

    JSON: first, second, tensors (name, shape, dtypes and nbytes of both, size, different, rmse, relative, max, snr,
    cosine), missing, extra, reshaped, total (rmse, relative, max, snr, cosine). An infinite snr, of equal tensors, is
    null.
    """
    _check_outputs(None, html)
    one, other = (open_model(path, key=key if is_torch(path) else None, skip=skip or ()) for path in (first, second))
    with executor_of(workers, dask) as executor, byte_progress("compare") as notify:
        if executor is None:
            found = difference_of(_Watched(one, notify), other)
        else:
            a, b = (
                open_weights(path, key=key if is_torch(path) else None, skip=skip or ()) for path in (first, second)
            )
            found = difference_by(executor, a, b, notify)
    if html is not None:
        with byte_progress("page") as notify:
            page.write(html, page.of_difference(first, second, found, _Watched(one, notify), other))
    if as_json:
        typer.echo(tables.to_json({"first": str(first), "second": str(second), **tables.plain(found)}))
    else:
        tables.print_difference(found)
    if max_error is not None:
        apart = [t.name for t in found.tensors if t.different and not (t.relative <= max_error and max_error > 0)]
        apart += [*found.missing, *found.extra, *(name for name, *_ in found.reshaped)]
        if apart:
            raise ValueError(
                f"{len(apart)} tensors, as {apart[0]!r}, differ by more than {max_error:g}, or in name or shape"
            )


# Files of other formats, which a packed model must not be taken for.
_FOREIGN = {*NOT_PACKED, *(module.SUFFIX for module in FORMATS.values())} - {".safetensors"}


# ---- shared ---------------------------------------------------------------------------------------------


def _pack(
    source: Path,
    weights: Weights,
    target: Path,
    recipe: Recipe,
    dry_run: bool,
    html: Path | None,
    as_json: bool,
    executor: Executor | None,
    **targets: Any,
) -> None:
    """Pack from file to file, and print the report."""
    _check_outputs(target, html)
    _require_match(recipe, weights)
    with byte_progress("plan" if dry_run else "pack") as notify:
        packed = pack_file(weights, target, recipe, dry_run=dry_run, notify=notify, executor=executor, **targets)
    if html is not None:
        model = None if dry_run else load(target)
        with byte_progress("page") as notify:
            watched = _Watched(weights, notify)
            page.write(html, page.of_packing(source, target, packed, packed.recipe or recipe, watched, model))
    _tell(source, file_to_write(weights, target), packed.recipe or recipe, packed, dry_run, as_json)


def _refuse_parts(key: str | None, skip: Sequence[str] | None, workers: int | None, dask: str | None) -> None:
    if key is not None or skip:
        raise typer.BadParameter("--key, --skip: not for an ONNX model; use --exclude")
    if workers is not None or dask is not None:
        raise typer.BadParameter("--workers, --dask: not for an ONNX model")


def _pack_onnx(
    source: Path,
    target: Path,
    recipe: Recipe,
    dry_run: bool,
    html: Path | None,
    as_json: bool,
    check: Path | bool = False,
    **options: Any,
) -> None:
    """Pack an ONNX model, print the report, and compare the outputs on random inputs or those of a file."""
    if source.suffix != ".onnx":
        raise typer.BadParameter(f"--output: an ONNX model is made of an ONNX model, got {source}; see fastopt export")
    _check_folders(target, html)
    before = None if html is None else open_weights(source)  # before the target, which may be the same file, is written
    with byte_progress("plan" if dry_run else "pack") as notify:
        packed = pack_onnx(source, target, recipe, dry_run=dry_run, notify=notify, **options)
    if html is not None and before is not None:
        after = None if dry_run else open_weights(target)
        shown = [t for t in packed.tensors if t.name in before and (after is None or t.name in after)]
        with byte_progress("page") as notify:
            content = page.of_packing(
                source, target, replace(packed, tensors=tuple(shown)), recipe, _Watched(before, notify), after
            )
            page.write(html, content)
    outputs = check_onnx(source, target, None if check is True else check) if check else None
    _tell(source, target, packed.recipe or recipe, packed, dry_run, as_json, outputs)


def _require_match(recipe: Recipe, names: Collection[str]) -> None:
    """Raise if patterns of --include match none of the tensors: then nothing would be packed."""
    if names and recipe.include and not any(fnmatchcase(name, p) for name in names for p in recipe.include):
        patterns = " or ".join(map(repr, recipe.include))
        raise ValueError(f"--include: no tensor matches {patterns}{pattern_proposal(recipe.include[0], names)}")


def _tell(
    source: Path,
    target: Path,
    recipe: Recipe,
    packed: Report,
    dry_run: bool,
    as_json: bool,
    outputs: Sequence[OutputReport] | None = None,
) -> None:
    """Print the report, the patterns that match no tensor, and how far outputs are apart."""
    for pattern in (*recipe.include, *recipe.exclude):  # of the others packing has warned
        if packed.tensors and not any(fnmatchcase(t.name, pattern) for t in packed.tensors):
            proposed = pattern_proposal(pattern, [t.name for t in packed.tensors])
            say(f"fastopt: warning: no tensor matches {pattern!r}{proposed}", err=True)
    size = None if dry_run else _file_bytes(target)
    if as_json:
        about = {"source": str(source), "target": str(target), "dry_run": dry_run, "file_bytes": size}
        checked = {} if outputs is None else {"outputs": tables.plain(outputs)}
        typer.echo(tables.to_json({**about, "recipe": recipe.to_dict(), **packed.to_dict(), **checked}))
    else:
        tables.print_report(packed)
        if outputs is not None:
            tables.print_outputs(outputs)
        say(f"{target}: {'not written' if size is None else size_text(size)}")


def _file_bytes(path: Path) -> int:
    """Return the size of a file; the size of an index includes its shards."""
    names = read_index(path) if path.name.endswith(".index.json") else []
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in names)


def _check_outputs(target: Path | None, html: Path | None = None) -> None:
    """Reject, before the work, outputs that could not be written or whose names belong to another format."""
    if target is not None and target.suffix in _FOREIGN:
        raise typer.BadParameter(f"--output: expected a .safetensors file, got {target}; see also fastopt export")
    _check_folders(target, html)


def _check_folders(target: Path | None, html: Path | None) -> None:
    for path in (target, html):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))


class _Watched(Mapping[str, Weight]):
    """A model that reports the progress of reading its tensors, one after the other."""

    def __init__(self, weights: PackedModel | Weights, notify: Notify) -> None:
        sizes = weights.sizes if isinstance(weights, Weights) else {name: w.nbytes for name, w in weights.items()}
        self._weights, self._progress = weights, Progress(sizes, notify)

    def __getitem__(self, name: str) -> Weight:
        self._progress.next(name)
        return self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
