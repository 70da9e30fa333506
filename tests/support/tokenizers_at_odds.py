"""Tokenizers that do something at the start or the end of a text, and chat templates as models have them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["Yes", "No", "blue", "green", "user", "model", "assistant", "Sky"]
CHARACTERS = [chr(i) for i in range(33, 127)] + ["\n", "▁", "é"]
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<call>"
    "{{ m.tool_calls | tojson }}</call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]


def legacy(template=None, ends=False, begins=False):
    """As Llama 2's: a dummy prefix before every piece of text, byte-pair merges up to the whole words of `WORDS`."""
    merges, vocab = [], {token: i for i, token in enumerate([*SPECIAL, "<unk>", *CHARACTERS])}
    for word in WORDS:
        pieces = [(word[:i], word[i]) for i in range(1, len(word)) if word[: i + 1] not in vocab]
        for left, right in [*pieces, ("▁", word)]:
            merges.append((left, right))
            vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return wrapped(made, template, ends, begins)


def metaspace(scheme, template=None, ends=False, begins=False):
    """The same words as `legacy`, split and begun by `Metaspace`."""
    made = legacy().backend_tokenizer
    made.normalizer = normalizers.Sequence([])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return wrapped(made, template, ends, begins)


def byte_level(template=None, ends=False, begins=False):
    """As GPT-2's, of bytes only but for a doubled line feed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ĊĊ"])}
    made = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made, template, ends, begins)


def wrapped(made, template, ends, begins):
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    parts = [*(["<s>"] if begins else []), "$A", *(["<eos>"] if ends else [])]
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "<eos>")]
    made.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = template
    return wrapped
