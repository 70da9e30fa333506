"""TRL with our head: the same script as with `trl.DPOTrainer` with two names changed; then rated pairs under
conditions.

Run: python examples/trl_dropin.py
"""

import string
import tempfile

try:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cpo_kernels.integrations import FusedDPOConfig as DPOConfig
    from cpo_kernels.integrations import FusedDPOTrainer as DPOTrainer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: this example needs TRL and datasets, the extra [trl] of cpo-kernels") from None

PAIRS = {
    "prompt": [f"{i}+{i}? " for i in range(8)],
    "chosen": [str(2 * i) for i in range(8)],
    "rejected": [str(2 * i + 1) for i in range(8)],
}
# The same pairs, half of them under a condition that asks for the wrong answer: correctness 0.
RATED = {
    "prompt": [f"<correctness: {asked}> {prompt}" for asked in (1, 0) for prompt in PAIRS["prompt"]],
    "chosen": PAIRS["chosen"] * 2,
    "rejected": PAIRS["rejected"] * 2,
    "chosen_scores": [[1]] * 16,
    "rejected_scores": [[0]] * 16,
    "condition": [[1]] * 8 + [[0]] * 8,
}


def tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.printable])}
    characters = Tokenizer(models.BPE(vocab, []))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>")


def llama(vocab_size):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def train(data, **options):
    tokens = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            folder,
            per_device_train_batch_size=8,
            logging_steps=20,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            **options,
        )
        trainer = DPOTrainer(
            llama(len(tokens)),
            llama(len(tokens)),  # the reference
            args,
            train_dataset=Dataset.from_dict(data),
            processing_class=tokens,
        )
        trainer.train()
    last = trainer.state.log_history[-2]
    print(f"loss {last['loss']:.3f}, reward accuracy {last['rewards/accuracies']:.2f}")


if __name__ == "__main__":
    train(PAIRS, max_steps=40, learning_rate=2e-3)
    train(RATED, max_steps=100, learning_rate=5e-3, objectives=[{"name": "correctness", "low": 0, "high": 1}])
