"Peak memory of a training step with a vocabulary of 50,000, whole logits beside pieces, each in a process of its own"
import resource, subprocess, sys
from rich.console import Console
from rich.table import Table

TOKENS, WIDTH, VOCABULARY = 2048, 64, 50_000
WAYS = ["nothing", "whole", "4", "8", "32"]


def peak(way):
    "MiB of this process, after one step"
    import torch
    from tuneforge.losses import LogitMath, loss_in_pieces
    from tuneforge.trainer import causal_loss
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(WIDTH, VOCABULARY, bias=False), torch.randn(1, TOKENS+1, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (1, TOKENS+1))
    if way=="whole": causal_loss(dict(logits=head(hidden)), targets).backward()
    elif way!="nothing": loss_in_pieces(head, LogitMath(), hidden[0, :-1], targets[0, 1:], int(way)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def main():
    if len(sys.argv)>1: return print(peak(sys.argv[1]))
    mib = {w: float(subprocess.run([sys.executable, __file__, w], capture_output=True, text=True, check=True).stdout) for w in WAYS}
    base, logits = mib["nothing"], TOKENS*VOCABULARY*4/2**20
    table = Table("loss", "peak over an idle process, MiB", "in logits of float32", "of whole", title=f"{TOKENS} tokens, vocabulary {VOCABULARY:,}: whole logits are {logits:.0f} MiB")
    for w in WAYS[1:]: table.add_row(w if w=="whole" else f"{w} pieces", f"{mib[w]-base:.0f}", f"{(mib[w]-base)/logits:.2f}", f"{(mib[w]-base)/(mib['whole']-base):.0%}")
    Console().print(table)


if __name__=="__main__": main()
