"""The command line. Heavy imports happen inside the commands, so that `mezo --help` answers at once."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from mezo import __version__
from mezo.cli.options import (
    DoctorOptions,
    EvalOptions,
    InspectOptions,
    MergeOptions,
    PlotOptions,
    PresetsOptions,
    ReplayOptions,
    TuneOptions,
)
from mezo.config import AUTO_OR_PRESET, PRESETS, MeZOConfig, coerced, preset
from mezo.errors import EngineError, NonFiniteLossError, UserError, is_out_of_memory
from mezo.names import unknown_key_message

_Options = TypeVar("_Options")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mezo`: exits with 0, 1 after an error, 2 after wrong usage, 130 by Ctrl-C, 143 by SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(f"mezo {__version__}")
        raise SystemExit(0)
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        known = f"the nearest one is {nearest[0]!r}" if nearest else f"there are {', '.join(COMMANDS)}"
        _fail(f"unknown command {name!r}; {known}", code=2)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it if it is there, and it talks
    try:
        with _terminable():
            COMMANDS[name][0](rest)
    except (UserError, NonFiniteLossError, EngineError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"out of memory; what was saved is intact, a smaller batch or dtype may fit ({_first_line(error)})")
    except _Terminated:
        _fail(f"terminated; {_GO_ON}", code=143)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_GO_ON}", code=130)


_GO_ON = "every finished step is in the journal, --resume_from_checkpoint goes on from there"


class _Terminated(BaseException):
    """SIGTERM came, as schedulers send it before they kill."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does: files closed, the terminal given back, one line."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _train(argv: list[str]) -> None:
    config = parse_train(argv)
    from mezo.cli.commands import train

    train(config)


def _eval(argv: list[str]) -> None:
    options = _parse(EvalOptions, argv, "mezo eval")
    from mezo.cli.commands import evaluate

    evaluate(options)


def _replay(argv: list[str]) -> None:
    options = _parse(ReplayOptions, _positional(argv, "run"), "mezo replay")
    from mezo.cli.commands import replay

    replay(options)


def _inspect(argv: list[str]) -> None:
    options = _parse(InspectOptions, _positional(argv, "run"), "mezo inspect")
    from mezo.cli.commands import inspect

    inspect(options)


def _doctor(argv: list[str]) -> None:
    options = _parse(DoctorOptions, _positional(argv, "run"), "mezo doctor")
    from mezo.cli.commands import doctor

    doctor(options)


def _plot(argv: list[str]) -> None:
    options = _parse(PlotOptions, argv, "mezo plot")
    from mezo.cli.commands import plot

    plot(options)


def _merge(argv: list[str]) -> None:
    options = _parse(MergeOptions, argv, "mezo merge")
    from mezo.cli.commands import merge

    merge(options)


def _presets(argv: list[str]) -> None:
    _parse(PresetsOptions, argv, "mezo presets")
    for name, entry in PRESETS.items():
        rates = ", ".join(f"{rate:g}" for rate in entry.learning_rates)
        values = "  ".join(f"{key}={value}" for key, value in entry.values.items())
        print(f"{name:15} learning_rate in {{{rates}}}  {values}\n{'':15} {entry.source}")


def _bench(argv: list[str]) -> None:
    from mezo.bench import BenchOptions
    from mezo.cli.commands import bench

    bench(_parse(BenchOptions, argv, "mezo bench"))


def _tune(argv: list[str]) -> None:
    config, options = parse_tune(argv)
    from mezo.cli.commands import tune

    tune(config, options, _without(argv, ["learning_rate", "epsilon", "max_steps", "output_dir", *_TUNE_NAMES]))


def _env(argv: list[str]) -> None:
    _parse(PresetsOptions, argv, "mezo env")
    from mezo.cli.commands import env

    env()


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (
        _train,
        "fine-tune a model; flags are the fields of MeZOConfig, --config FILE.yaml and --preset under them",
    ),
    "tune": (_tune, "search learning rate and epsilon: short runs, of which the better ones go on"),
    "eval": (_eval, "accuracy and loss of a model, or of a model with an adapter"),
    "replay": (_replay, "rebuild the trained weights from the base model and the journal alone"),
    "inspect": (_inspect, "summary of a run's journal: settings, steps, losses, tokens computed and reused"),
    "doctor": (_doctor, "what ails a run, with its numbers, and what to do next"),
    "plot": (_plot, "losses, evaluations, projected_grad and speed of one or several runs, as PNG and HTML"),
    "merge": (_merge, "add a LoRA adapter to its base model and save a transformers model"),
    "bench": (_bench, "time and memory of a step on this machine, against plain forward passes"),
    "presets": (_presets, "list the paper's settings for --preset"),
    "env": (_env, "versions and hardware, for bug reports"),
}


def parse_train(argv: list[str]) -> MeZOConfig:
    """The config of a command line: flags over --config over --preset, or over method auto, over the defaults."""
    return MeZOConfig.from_dict(_train_values(argv, _TrainOptions, "mezo train"))


def parse_tune(argv: list[str]) -> tuple[MeZOConfig, TuneOptions]:
    """The same with the options of `mezo tune`; a preset's learning rates are the candidates if none are named."""
    values = _train_values(argv, _TuneOptions, "mezo tune")
    tune = TuneOptions(**{name: values.pop(name) for name in _TUNE_NAMES})  # type: ignore[arg-type]
    if values["method"] == "auto" and tune.learning_rates:
        values.setdefault("learning_rate", tune.learning_rates[0])  # a rate is named
    return MeZOConfig.from_dict(values), tune


def _train_values(argv: list[str], options: type, prog: str) -> dict[str, object]:
    argv, config_file = _take(argv, "config")
    argv, preset_name = _take(argv, "preset")
    from_file = _read_yaml(Path(config_file)) if config_file is not None else {}
    preset_name = preset_name or str(from_file.pop("preset", "")) or None
    values: dict[str, object] = {"model_name_or_path": tyro.MISSING}
    if preset_name is not None:
        values |= {**preset(preset_name).config(model_name_or_path="").to_dict(), **values}
        if "learning_rates" in options.__annotations__:
            values |= {"learning_rates": preset(preset_name).learning_rates}
    parsed = dataclasses.asdict(_parse(options, argv, prog, options(**values | from_file), extra=("config", "preset")))
    if parsed["method"] != "auto":
        return parsed
    if preset_name is not None:
        raise UserError(AUTO_OR_PRESET)
    named = {*from_file, *(name.removeprefix("no_") for name in _options(argv)), *_TUNE_NAMES}
    return {name: value for name, value in parsed.items() if name in named}


def _unchecked(*parts: type) -> Any:
    """A dataclass with the fields of all but no checks: tyro would print a failed check as a parsing error."""
    fields: list[tuple[str, Any, Any]] = []
    for part in parts:
        hints = get_type_hints(part)
        fields += [(f.name, hints[f.name], dataclasses.field(default=f.default)) for f in dataclasses.fields(part)]
    options = dataclasses.make_dataclass(parts[-1].__name__, fields, kw_only=True)
    texts = [str(part.__doc__).rstrip().partition("Args:\n") for part in parts]
    options.__doc__ = texts[-1][0] + "Args:\n" + "\n".join(arguments for *_, arguments in texts) + "\n    "
    return options


_TrainOptions = _unchecked(MeZOConfig)
_TuneOptions = _unchecked(MeZOConfig, TuneOptions)
_TUNE_NAMES = [f.name for f in dataclasses.fields(TuneOptions)]


def _read_yaml(path: Path) -> dict[str, object]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a byte that is none
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: a mapping of option names to values is needed")
    names = [f.name for f in dataclasses.fields(MeZOConfig)]
    for key in values:
        if key not in (*names, "preset"):
            raise UserError(f"--config {path}: {unknown_key_message(str(key), names)}")
    hints = get_type_hints(MeZOConfig)
    return {key: value if key == "preset" else coerced(key, value, hints[key]) for key, value in values.items()}


def _parse(
    options: type[_Options], argv: list[str], prog: str, default: _Options | None = None, extra: Sequence[str] = ()
) -> _Options:
    """tyro's parser with underscores, and one line about an unknown option."""
    names = [f.name for f in dataclasses.fields(options)]  # type: ignore[arg-type]
    for name in _options(argv):
        if name.removeprefix("no_") not in (*names, "help"):
            raise UserError(unknown_key_message(name, [*names, *extra]).replace("'", ""))
    parsed: _Options = tyro.cli(
        options,
        args=_words_apart(argv),
        prog=prog,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )  # type: ignore[assignment]  # tyro's overload for a default that may be None
    return parsed


def _words_apart(argv: list[str]) -> list[str]:
    """Label words that are written as in Python or JSON, `{"0": "bad"}`, as tyro takes them: `0 bad`."""
    for i, argument in enumerate(argv[1:], start=1):
        if argv[i - 1].replace("-", "_") == "__label_words" and argument.startswith("{"):
            try:
                words = ast.literal_eval(argument)
            except (ValueError, SyntaxError):
                words = None
            if not isinstance(words, dict):
                raise UserError(f"--label_words {argument}: write label and word in turn: 0 terrible 1 great")
            return [*argv[:i], *(str(part) for pair in words.items() for part in pair), *argv[i + 1 :]]
    return argv


def _options(argv: Sequence[str]) -> list[str]:
    """The options that a command line names, with underscores."""
    return [a[2:].partition("=")[0].replace("-", "_") for a in argv if a.startswith("--")]


def _take(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """Removes `--option VALUE` or `--option=VALUE`."""
    for i, argument in enumerate(argv):
        if argument == f"--{option}":
            if i + 1 == len(argv):
                raise UserError(f"--{option} needs a value")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if argument.startswith(f"--{option}="):
            return argv[:i] + argv[i + 1 :], argument.partition("=")[2]
    return argv, None


def _without(argv: list[str], options: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    kept: list[str] = []
    dropping = False
    for argument in argv:
        if argument.startswith("--"):
            dropping = argument[2:].partition("=")[0].replace("-", "_") in options
        if not dropping:
            kept.append(argument)
    return kept


def _positional(argv: list[str], name: str) -> list[str]:
    """Lets a leading positional argument stand for `--name`."""
    return [f"--{name}", *argv] if argv and not argv[0].startswith("-") else argv


def _help() -> str:
    lines = "\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"mezo {__version__}: fine-tune language models with forward passes only\n\n"
        f"usage: mezo COMMAND [options]\n\n{lines}\n\nmezo COMMAND --help lists a command's options."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"mezo: error: {message}", file=sys.stderr)
    raise SystemExit(code)
