"""Memory of the loss: logits at masked positions only, against logits everywhere (32 x 512 tokens, V = 30,592, 15 %).

What is compared is the peak of the process above what it held before: forward and backward of decoder and loss, from hidden
states of 768 dimensions, each in a process of its own. Full logits are `trainer.masked_logits_only_loss: false`: cross-entropy
over every position, as transformers' models compute it.
"""

import resource
import sys

from _bench import arguments, bar, finish, run, table

TOKENS, WIDTH, VOCABULARY, MASKED = 32 * 512, 768, 30_592, 0.15


def measure(masked_only: bool) -> None:
    """In a process of its own: prints the peak in MiB above what it held before the loss."""
    import torch
    import torch.nn.functional as F

    from neobert.model.kernels import IGNORED, full_cross_entropy, linear_cross_entropy
    from neobert.model.modeling_neobert import NeoBERTConfig, NeoBERTForMaskedLM

    torch.manual_seed(0)
    config = NeoBERTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=0, num_attention_heads=12)
    model = NeoBERTForMaskedLM(config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    hidden.grad = torch.zeros_like(hidden)
    labels = torch.where(torch.rand(TOKENS) < MASKED, torch.randint(0, VOCABULARY, (TOKENS,)), IGNORED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if masked_only:
            targets = (labels != IGNORED).nonzero().squeeze(1)
            inputs = hidden.index_select(0, targets), model.decoder_weight(), None, labels[targets]
            loss_sum, _ = linear_cross_entropy(*inputs)
        else:
            loss_sum, _ = full_cross_entropy(F.linear(hidden, model.decoder_weight()), labels)
    loss_sum.backward()
    print(loss_sum.item(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    options = arguments(__doc__, kind={"choices": ["masked", "full"]})
    if options.kind:
        measure(options.kind == "masked")
        return
    found = {kind: run([sys.executable, __file__, "--kind", kind]).split() for kind in ("masked", "full")}
    peaks = {kind: float(words[1]) for kind, words in found.items()}
    rows = [
        (f"logits at {kind} positions" if kind == "masked" else "full logits", found[kind][0], f"{peak:,.0f} MiB")
        for kind, peak in peaks.items()
    ]
    table([("", "loss sum", "peak"), *rows])
    bar("loss_memory", peaks["masked"] / peaks["full"], 0.25, at_most=True)
    finish()


if __name__ == "__main__":
    main()
