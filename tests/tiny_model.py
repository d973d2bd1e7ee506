"""A model that is made in a moment, for tests that need real processes and any model."""

from pathlib import Path

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def build_tiny_model(folder: Path) -> Path:
    """Writes a random Llama of two layers that holds 512 tokens, with a tokenizer and a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.engine.families import VOCAB_SIZE
    from tests.engine.reference import build_model

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the queue holds the prompts and the worker pulls them " * 20], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.chat_template = TEMPLATE
    build_model("llama").save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
