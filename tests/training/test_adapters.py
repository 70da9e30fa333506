"""LoRA and QLoRA, bitsandbytes optimizers, gradient checkpointing, and the model card; all on the CPU."""

import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_kernels.evaluation.likelihood import score_answers
from cpo_kernels.evaluation.loading import find_model, load
from cpo_kernels.recipe.config import read_config
from cpo_kernels.recipe.keys import CHOICES
from cpo_kernels.training import adapters as adapters_module
from cpo_kernels.training import loop as loop_module
from cpo_kernels.training.loop import train
from cpo_kernels.training.models import fingerprint, load_model
from tests.support import tiny
from tests.support.tiny import one_thread  # noqa: F401
from tests.training.test_training import RECORDS, curve, naive_seq_logps, run, values

LORA = {"train": "lora", "lora": {"r": 4, "alpha": 8}, "lr": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model on disk: 4-bit weights are made while it is read."""
    folder = tmp_path_factory.mktemp("base")
    options = {**tiny.MODEL, "hidden_size": 64}  # blocks of 64 weights
    model, tokenizer = load_model(read_config(tiny.config(model={"config": options})).model, None, tiny.tokenizer())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora_run(folder, base, quantize=None, stage="cdpo", **training):
    model = {"name": str(base), "quantize": quantize, "config": None}
    sections = {"run_dir": str(folder), "model": model, "training": {**LORA, **training}}
    return train(tiny.config(stage, **sections), records=RECORDS)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], ["all-linear"]])
def test_lora_targets_are_names_of_layers(base, targets):
    pytest.importorskip("peft")
    model = load_model(read_config({"model": str(base)}).model)[0]
    training = read_config({"training": {"train": "lora", "lora": {"targets": targets}}}).training
    adapted = adapters_module.add_adapters(model, training, 0)
    seen = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert seen == set(targets) if targets != ["all-linear"] else {"q_proj", "down_proj"} < seen


def test_lora_trains_adapters_and_saves_a_plain_model(tmp_path, base, monkeypatch):
    pytest.importorskip("peft")
    seen = {}
    real = loop_module.to_save

    def to_save(model, *rest):
        seen.update(before=dict(model.named_parameters()))
        return real(model, *rest)

    monkeypatch.setattr(loop_module, "to_save", to_save)
    result = lora_run(tmp_path / "run", base, max_steps=12)
    trained = [name for name, p in seen["before"].items() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("lm_head" in name for name in trained)
    assert values(result, "loss")[0] == pytest.approx(math.log(2)) and values(result, "loss")[-1] < 0.67
    original = load_model(read_config({"model": str(base)}).model)[0]
    frozen = dict(original.named_parameters())
    for name, p in seen["before"].items():
        plain = name.replace(".base_layer", "")
        assert plain not in frozen or "proj" in name or torch.equal(p, frozen[plain])
    loaded = load_model(read_config({"model": str(tmp_path / "run/model")}).model)[0]
    assert {name for name, _ in loaded.named_parameters()} == set(frozen)  # plain transformers, adapters merged
    assert fingerprint(loaded) == fingerprint(result.model) != fingerprint(original)


def test_the_reference_is_the_model_with_its_adapters_off(base):
    pytest.importorskip("peft")
    captured = {}
    real = loop_module.Loop.run_epochs

    def run_epochs(self, epochs, eval_set):
        captured["groups"] = [group for unit in epochs[0] for group in unit][:3]
        return real(self, epochs, eval_set)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module.Loop, "run_epochs", run_epochs)
        keys = {"model": {"name": str(base), "config": None}, "training": {**LORA, "max_steps": 2}}
        train(tiny.config("cdpo", **keys), records=RECORDS)
    original = load_model(read_config({"model": str(base)}).model)[0]
    with torch.no_grad():
        expected = torch.cat([naive_seq_logps(original, g) for g in captured["groups"]])
    found = torch.tensor([x for g in captured["groups"] for x in g.ref_logps], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_qlora_on_a_4_bit_base(tmp_path, base, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # On CPUs with AVX512 it repacks weights at their first evaluation and rounds their scales to bfloat16, so a process
    # that evaluates at another step computes otherwise from there on. GPUs do not.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    whole = lora_run(tmp_path / "whole", base, "4bit", max_steps=6, checkpoint_every=3, optimizer="paged_adamw_8bit")
    assert values(whole, "loss")[-1] < values(whole, "loss")[0]
    layer = whole.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
    saved = {path.name for path in (tmp_path / "whole/model").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    loaded = load_model(read_config({"model": {"name": str(tmp_path / "whole/model"), "quantize": "4bit"}}).model)[0]
    template, records = whole.template, RECORDS[:2]
    scores = [score_answers(m, template, records, [{}]) for m in (loaded, whole.model)]
    for found, expected in zip(*scores, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # new adapters do not take the place of those that were trained
    with pytest.raises(ValueError, match="the model already has adapters.* merge them first"):
        lora_run(tmp_path / "second", tmp_path / "whole/model", "4bit", max_steps=1)
    # and it goes on after a stop, 8-bit moments included
    shutil.rmtree(tmp_path / "whole/checkpoints/step-000006")
    resumed = lora_run(
        tmp_path / "whole", base, "4bit", max_steps=6, checkpoint_every=3, optimizer="paged_adamw_8bit", resume=True
    )
    assert curve(resumed) == curve(whole)


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_eval_judges_runs_and_checkpoints_with_adapters(tmp_path, base, monkeypatch, quantize):
    if quantize:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    trained = lora_run(tmp_path / "run", base, quantize, max_steps=4, checkpoint_every=4)
    (expected,) = score_answers(trained.model, trained.template, RECORDS[:1], [{}])
    original = load_model(read_config({"model": {"name": str(base), "quantize": quantize}}).model)[0]
    (before,) = score_answers(original, trained.template, RECORDS[:1], [{}])
    assert float((before - expected).abs().max()) > 0.1
    for place in ("run", "run/checkpoints/step-000004"):
        model, template = load(find_model(str(tmp_path / place)))
        (found,) = score_answers(model, template, RECORDS[:1], [{}])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_bitsandbytes_learn_and_resume(tmp_path, optimizer):
    pytest.importorskip("bitsandbytes")
    options = {**tiny.MODEL, "intermediate_size": 256}  # 8-bit moments begin at 4,096 elements
    keys = {"run_dir": str(tmp_path / "run"), "model": {"config": options}}
    training = {"optimizer": optimizer, "max_steps": 6, "checkpoint_every": 4, "lr": 1e-2}
    whole = run("cpsft", **keys, training=training)
    plain = run("cpsft", model={"config": options}, training={**training, "optimizer": "adamw", "checkpoint_every": 0})
    assert values(whole, "loss")[-1] < values(whole, "loss")[0] - 0.3
    tolerance = 1e-5 if optimizer == "paged_adamw" else 0.05
    assert values(whole, "loss") == pytest.approx(values(plain, "loss"), rel=tolerance)
    resumed = run("cpsft", **keys, training={**training, "resume": True})
    assert curve(resumed) == curve(whole) and fingerprint(resumed.model) == fingerprint(whole.model)


def test_gradient_checkpointing_changes_nothing(base):
    plain = run(training={"max_steps": 2})
    again = run(training={"max_steps": 2, "gradient_checkpointing": True})
    assert again.model.is_gradient_checkpointing
    assert values(again, "loss") == pytest.approx(values(plain, "loss"), rel=1e-5)
    assert values(again, "grad_norm") == pytest.approx(values(plain, "grad_norm"), rel=1e-4)


def test_a_compiled_body_computes_the_same_at_every_length():
    plain = run("cpsft", training={"max_steps": 4, "batch_size": 6, "eval_size": 3})
    compiled = run("cpsft", training={"max_steps": 4, "batch_size": 6, "eval_size": 3, "compile": True})
    assert compiled.model.base_model._compiled_call_impl is not None
    for name in ("loss", "grad_norm", "eval_loss"):
        assert values(compiled, name) == pytest.approx(values(plain, name), rel=1e-4)


@pytest.mark.parametrize(
    "model, training, reason",
    [
        ({"quantize": "4bit"}, {"train": "all"}, r"a 4-bit model can only train adapters: .* \(now all\)"),
        ({}, {"train": "lora", "lora": {"targets": ["lm_head"]}}, "Remove 'lm_head' from target_modules"),
        ({"quantize": "8bit"}, {}, "model.quantize: '8bit' is not one of 4bit"),
        ({"name": None, "config": tiny.MODEL, "quantize": "4bit"}, {"train": "lora"}, "model.config creates new ones"),
        ({}, {"optimizer": "lion"}, "training.optimizer: 'lion' is not one of adamw, adamw_8bit"),
    ],
)
def test_what_cannot_be_is_refused(base, model, training, reason):
    if "quantize" in model:
        pytest.importorskip("bitsandbytes")
    keys = {"model": {"name": str(base), "config": None, **model}, "training": training}
    with pytest.raises(ValueError, match=reason):
        train(tiny.config("cdpo", **keys), tokenizer=tiny.tokenizer(), records=RECORDS)


def test_packages_that_are_missing_are_named(base, monkeypatch):
    from cpo_kernels.training import adapters

    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    for keys in ({"training": {"train": "lora"}}, {"training": {"optimizer": "adamw_8bit"}}):
        with pytest.raises(ValueError, match="which is not installed: pip install '(peft|bitsandbytes)<1,>="):
            run("cpsft", **keys)


# -------------------------------------------------------------------- a model folder that holds adapters

ADAPTERS = {
    "layers": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both, tied": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "rank-stabilized, biases": {"target_modules": "all-linear", "use_rslora": True, "bias": "all"},
}


def adapters_over(base, folder, **keys):
    """Adapters that do something, saved in `folder`; the PeftModel."""
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(read_config({"model": str(base)}).model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **keys))
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.1)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 20).reshape(2, 9)).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_a_folder_become_part_of_its_model(tmp_path, base, kind):
    """The base ties its head to its embeddings; saved and read again it computes the same."""
    expected = logits(adapters_over(base, tmp_path / "adapters", **ADAPTERS[kind]))
    model = load_model(read_config({"model": str(tmp_path / "adapters")}).model)[0].eval()
    model.save_pretrained(tmp_path / "plain")
    again = load_model(read_config({"model": {"name": str(tmp_path / "plain"), "tokenizer": str(base)}}).model)[0]
    assert float((logits(load_model(read_config({"model": str(base)}).model)[0]) - expected).abs().max()) > 1e-3
    for found in (model, again.eval()):
        assert not adapters_module.has_adapters(found)
        torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-4)


def saved_adapters(folder, model, **keys):
    """Logits of `model` with adapters, which are saved in `folder` with tokens and all."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **keys)).eval()
    for name, p in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return logits(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
def test_adapters_with_tokens_of_their_own(tmp_path, tie, saved):
    config = read_config(tiny.config(model={"config": {**tiny.MODEL, "tie_word_embeddings": tie}})).model
    load_model(config, None, tiny.tokenizer())[0].save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    expected = saved_adapters(tmp_path / "sft", model, target_modules=["q_proj"], modules_to_save=saved)
    loaded = load_model(read_config({"model": str(tmp_path / "sft")}).model)[0].eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_adapters_without_the_rows_of_their_tokens_are_refused(tmp_path):
    config = read_config(tiny.config(model={"config": {**tiny.MODEL, "tie_word_embeddings": False}})).model
    load_model(config, None, tiny.tokenizer())[0].save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    saved_adapters(tmp_path / "sft", model, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"trained with 105 tokens on a model of 102, but hold only .*embed_tokens"):
        load_model(read_config({"model": str(tmp_path / "sft")}).model)


@pytest.mark.filterwarnings("ignore")
def test_adapters_over_adapters(tmp_path, base):
    """All of them count, in their order; none may lie beside the weights, or over itself."""
    saved_adapters(tmp_path / "sft", AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"])
    model = load_model(read_config({"model": str(tmp_path / "sft")}).model)[0]
    model.name_or_path = str(tmp_path / "sft")
    expected = saved_adapters(tmp_path / "dpo", model, target_modules=["q_proj", "v_proj"])
    loaded = load_model(read_config({"model": str(tmp_path / "dpo")}).model)[0].eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    both = shutil.copytree(base, tmp_path / "both")
    saved_adapters(both, AutoModelForCausalLM.from_pretrained(both), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="its base model has adapters of its own; merge them into it first"):
        load_model(read_config({"model": str(both)}).model)
    (both / "config.json").unlink()
    with pytest.raises(ValueError, match="the adapters in .*both name themselves as base model"):
        load_model(read_config({"model": str(both)}).model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHOICES["training.train"])
def test_a_run_from_a_folder_of_adapters_saves_what_it_trained(tmp_path, base, kind, monkeypatch):
    """And its reference is the model with those adapters."""
    start = adapters_over(base, tmp_path / "adapters", **ADAPTERS["layers"])
    captured = []
    real = loop_module.Loop.run_epochs
    monkeypatch.setattr(
        loop_module.Loop,
        "run_epochs",
        lambda self, epochs, *rest: captured.extend(g for unit in epochs[0] for g in unit) or real(self, epochs, *rest),
    )
    model = {"name": str(tmp_path / "adapters"), "config": None}
    training = {**LORA, "train": kind, "k": 1, "max_steps": 3}
    result = train(tiny.config("cdpo", run_dir=str(tmp_path / "run"), model=model, training=training), records=RECORDS)
    assert values(result, "loss")[0] == pytest.approx(math.log(2))
    with torch.no_grad():
        expected = torch.cat([naive_seq_logps(start, g) for g in captured[:3]])
    found = torch.tensor([x for g in captured[:3] for x in g.ref_logps], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    saved = load_model(read_config({"model": str(tmp_path / "run/model")}).model)[0].eval()
    torch.testing.assert_close(logits(saved), logits(result.model), atol=1e-5, rtol=1e-4)
    assert float((logits(saved) - logits(start)).abs().max()) > 1e-3
    assert (tmp_path / "run/model/model.safetensors").exists()
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"- base: {tmp_path}/adapters, adapters, merged into {base} before training" in card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHOICES["training.train"])
def test_a_given_model_with_adapters_is_refused(tmp_path, base, kind):
    """Its own adapters would be trained or not, and saved or not, apart from what training.train says."""
    adapted = adapters_over(base, tmp_path, **ADAPTERS["layers"])
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=f"already has adapters, with which training.train: {kind} cannot"):
            train(
                tiny.config("cdpo", training={"train": kind}), model=model, tokenizer=tiny.tokenizer(), records=RECORDS
            )


def test_adapters_that_are_no_weights_are_refused(tmp_path, base):
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(read_config({"model": str(base)}).model)
    peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="adapters of type PROMPT_TUNING cannot be merged into the model's weights"):
        load_model(read_config({"model": {"name": str(tmp_path), "tokenizer": str(base)}}).model)


@pytest.mark.parametrize("kind", CHOICES["training.train"])
def test_what_cannot_be_saved_is_said_before_the_first_step(tmp_path, base, kind, monkeypatch):
    """Published models have such generation settings; transformers refuses to write them."""
    model = load_model(read_config({"model": str(base)}).model)[0]
    model.generation_config.temperature = 0.6
    monkeypatch.setattr(loop_module, "Loop", None)
    with pytest.raises(
        ValueError, match="the trained model could not be saved: ValueError: GenerationConfig is invalid"
    ):
        keys = {"run_dir": str(tmp_path / "run"), "training": {**LORA, "train": kind}}
        train(tiny.config("cdpo", **keys), model=model, tokenizer=tiny.tokenizer(), records=RECORDS)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------- the card


def test_the_model_card_says_how_to_write_the_tags_and_its_example_runs(tmp_path, monkeypatch, capsys):
    result = run("cdpo", run_dir=str(tmp_path / "run"), training={"max_steps": 2})
    card = (tmp_path / "run/model/README.md").read_text()
    for name in ("honesty", "helpfulness"):
        assert f"| {name} | 1 | 5 | `{name}=5` | `<{name}: 5>` |" in card
    assert "(messages, honesty=5, helpfulness=1, **options)" in card and "arXiv 2402.19085" in card
    assert '`"chat_template_kwargs": {"honesty": 5, "helpfulness": 5}`' in card
    last = values(result, "eval_loss")[-1]
    assert f"held-out prompts after step 2: loss {last:.4g}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "run/model")
    exec(code, {})
    assert len(capsys.readouterr().out) > 0
    assert "Without any level the model aims for the best on everything." in card
    for mixture, said in (("attained", False), ("none", True)):
        keys = {"strip_best": 0, "mixture": [{"share": 1}, {"sampler": mixture}]}
        run("cdpo", run_dir=str(tmp_path / mixture), training={"max_steps": 1}, conditions=keys)
        card = (tmp_path / mixture / "model/README.md").read_text()
        assert ("Without any level" in card) == said and ("trained with tags on every prompt" in card) != said
    plain = run("dpo", run_dir=str(tmp_path / "dpo"), training={"max_steps": 1})
    card = (tmp_path / "dpo/model/README.md").read_text()
    assert "## Levels" not in card and "apply_chat_template(messages, **options)" in card and plain.model is not None
