"""A SentencePiece tokenizer from records, written as a Hugging Face fast tokenizer with a chat template."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h3scale.data.records import Record
from h3scale.errors import ConfigError

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# <|role|> content <|end|>, one after the other: nothing outside the markers, so a prompt is a prefix of its conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(records: Sequence[Record], vocab_size: int, character_coverage: float = 0.9995) -> Any:
    """A transformers fast tokenizer (BPE, as Llama's) trained on prompts and responses; ids equal SentencePiece's own.

    Deterministic. Every text can be encoded and decoded back (unknown characters as bytes, line breaks and runs of
    blanks kept). Raises ConfigError (78) when the text does not yield that many pieces.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for record in records for text in _lines(record)]),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",  # unigram keeps few whole words of a small text: a third more tokens a record
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            control_symbols=list(ROLES),
            unk_id=0,
            pad_id=1,
            eos_id=2,
            bos_id=-1,
            pad_piece=PAD,
            eos_piece=END,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"vocab_size: {vocab_size}: {str(error).splitlines()[-1]}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast(processor),
        pad_token=PAD,
        eos_token=END,
        unk_token=processor.id_to_piece(0),
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the files that AutoTokenizer.from_pretrained reads."""
    tokenizer.save_pretrained(folder)


def _lines(record: Record) -> list[str]:
    return [line for text in (record.prompt, record.response) for line in text.split("\n") if line]


def _fast(processor: Any) -> Any:
    """SentencePiece's pieces and scores in the tokenizers library; blanks are treated as SentencePiece does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(ids, _merges(pieces, ids), unk_token=pieces[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in (PAD, END, *ROLES)])
    return tokenizer


def _merges(pieces: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges in SentencePiece's order: pieces by id, and of one piece the split into the earliest pieces first."""
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
    return merges
