"""Packing: share of real tokens in packed rows of the shipped text, and whether every microbatch is full."""

from _bench import TEXT, TOKENIZER, arguments, bar, finish, table

from neobert.data.batch import Collator
from neobert.data.loader import Pipeline
from neobert.data.masking import Masker
from neobert.data.order import StreamReader
from neobert.data.packing import Packer, Segmenter
from neobert.data.sources import find_splits
from neobert.data.tokenizer import load_tokenizer, text_tokenizer

BATCH_SIZE = 8


def fill(length: int) -> tuple[float, bool]:
    """(share of real tokens, all microbatches full) over one epoch."""
    tokenizer = text_tokenizer(load_tokenizer("", str(TOKENIZER)))
    masker = Masker(0, 0.15, False, tokenizer.mask_id, tokenizer.special_ids, tokenizer.num_real)
    pipeline = Pipeline(
        StreamReader(find_splits(str(TEXT), None, None, None)[0]),
        tokenizer,
        Segmenter(length, "split", tokenizer.cls_id, tokenizer.sep_id),
        Packer(length),
        Collator(masker, tokenizer.pad_id, True, length),
        BATCH_SIZE,
        num_epochs=1,
        keep_short_batch=False,
    )
    batches = [batch for batch, _ in pipeline.batches()]
    num_tokens = sum(batch.num_tokens for batch in batches)
    full = all(batch.input_ids.shape == (BATCH_SIZE, length) for batch in batches)
    return num_tokens / (len(batches) * BATCH_SIZE * length), full


def main() -> None:
    arguments(__doc__)
    measured = {length: fill(length) for length in (128, 256, 512, 1024)}
    rows = [(f"{length}", f"{share:.2%}", "all" if full else "NO") for length, (share, full) in measured.items()]
    table([("row length", "real tokens", "full microbatches"), *rows])
    bar("packing_fill_512", measured[512][0], 0.985)
    bar("full_microbatches", min(full for _, full in measured.values()), 1)
    finish()


if __name__ == "__main__":
    main()
