"""Pseudo-perplexity: ours against a loop that masks one token at a time, in float64, by transformers on the same weights.

Texts are the first paragraphs of the shipped evaluation text. The model is 256 wide with 4 layers and a vocabulary of 30,592
(`--vocabulary`), untrained: the cost is the same, and the value is as comparable. The clock runs over the computation. Both are
bound by matrix products, so the ratio is that of float64 to float32, times the logits that the loop computes at every place.
"""

import math
import time

from _bench import TEXT, TOKENIZER, alternate, arguments, bar, finish, table


def main() -> None:
    import torch
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    from neobert.checkpoints.layouts import eurobert_config, to_eurobert
    from neobert.data.tokenizer import load_tokenizer, special_ids, text_tokenizer
    from neobert.inference.masked_lm import pseudo_perplexity
    from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM

    args = arguments(__doc__, vocabulary={"type": int, "default": 30_592})
    hf_tokenizer = load_tokenizer("", str(TOKENIZER))
    tokenizer = text_tokenizer(hf_tokenizer)
    texts = (TEXT / "validation.txt").read_text().splitlines()
    pieces = [piece[:254] for piece in tokenizer.encode(texts[: 4 if args.quick else 12]) if len(piece)]
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    ours = NeoBERTForMaskedLM(NeoBERTConfig(vocab_size=args.vocabulary, **shape)).eval()
    theirs = EuroBertForMaskedLM(EuroBertConfig(**eurobert_config(ours.config, special_ids(hf_tokenizer))))
    theirs.load_state_dict(to_eurobert(ours.state_dict()))
    theirs = theirs.double().eval()
    values: dict[str, float] = {}

    def run_ours() -> float:
        begin = time.perf_counter()
        values["ours"] = pseudo_perplexity(ours, tokenizer, pieces).pseudo_perplexity
        return time.perf_counter() - begin

    @torch.no_grad()
    def run_naive() -> float:
        begin, total = time.perf_counter(), 0.0
        for piece in pieces:
            row = torch.tensor([[tokenizer.cls_id, *piece.tolist(), tokenizer.sep_id]])
            for place in range(1, row.shape[1] - 1):
                masked = row.clone()
                masked[0, place] = tokenizer.mask_id
                logits = theirs(input_ids=masked).logits[0, place]
                total += logits.log_softmax(-1)[row[0, place]].item()
        values["naive"] = math.exp(-total / sum(map(len, pieces)))
        return time.perf_counter() - begin

    run_ours()
    seconds = alternate({"ours": run_ours, "naive": run_naive}, 1 if args.quick else 3)
    print(f"{len(pieces)} texts, {sum(map(len, pieces)):,} tokens")
    table(
        [
            ("", "pseudo-perplexity", "seconds"),
            *((n, f"{values[n]:.4f}", f"{seconds[n]:.2f}") for n in ("ours", "naive")),
        ]
    )
    bar("pseudo_perplexity_relative_difference", abs(values["ours"] / values["naive"] - 1), 1e-4, at_most=True)
    bar("pseudo_perplexity_speedup", seconds["naive"] / seconds["ours"], 5.0)
    finish()


if __name__ == "__main__":
    main()
