"""The nearest matrix with orthonormal rows or columns, by polynomial iterations of matrix products only.

Shapes: B matrices of R rows and C columns.

A matrix U S V' goes to U p(S) V' with an odd polynomial p that pushes singular values towards 1:

- `polar_express` (arXiv 2505.16932): another quintic in every step, each the best one for the interval that the step
  before leaves. From the ninth step on the last one is repeated, which converges to 1.
- `newton_schulz` (Keller Jordan's Muon): one quintic, steepest at 0; ends between 0.68 and 1.21, never at 1.

A step multiplies small singular values by at most 8.3, then about 4, so the number of steps bounds the condition number
that can be evened out: an odd polynomial of degree 5^k that stays below 1.3 has a slope of at most 1.3 * 5^k at 0. Five steps
(the default of everybody) cannot lift 1e-4 of the largest singular value beyond 0.41, whatever the coefficients.
docs/training.md has the table. What is smaller is lost in bfloat16 anyway, whose products round at 4e-3.

On a CPU a long stack is worked off in runs that stay in the cache, all steps for one run before the next: with AMX twice as
fast as one matrix at a time, and as the whole stack at once.
"""

from itertools import repeat

import torch
from torch import Tensor

CPU_ELEMENTS = 6 * 2**20  # of a run of matrices on a CPU: 12 MiB in bfloat16
EPS = 1e-7
SAFETY = 1.01  # keeps singular values below the interval's end despite rounding

Quintic = tuple[float, float, float]  # a x + b x^3 + c x^5

_NEWTON_SCHULZ: Quintic = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_CONVERGENT: Quintic = (1.875, -1.25, 0.375)

METHODS = ("polar_express", "newton_schulz")


def quintics(method: str, num_steps: int) -> list[Quintic]:
    """The polynomial of each step. Raises ValueError for an unknown method or fewer than one step."""
    if method not in METHODS:
        raise ValueError(f"no orthogonalization {method!r}; there are: {', '.join(METHODS)}")
    if num_steps < 1:
        raise ValueError(f"ns_steps must be at least 1, got {num_steps}")
    if method == "newton_schulz":
        return [_NEWTON_SCHULZ] * num_steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _POLAR_EXPRESS]
    return [*safe, *repeat(_CONVERGENT, max(0, num_steps - len(safe)))][:num_steps]


@torch.no_grad()
def orthogonalize_(x_BRC: Tensor, method: str = "polar_express", num_steps: int = 5) -> Tensor:
    """Replace each matrix of a stack by its orthogonalised form, in its own dtype; zero stays zero. Returns the stack."""
    steps = quintics(method, num_steps)
    margin = SAFETY if method == "polar_express" else 1.0
    B, R, C = x_BRC.shape
    run, n = B, min(R, C)
    if x_BRC.device.type == "cpu":  # as many as `CPU_ELEMENTS` holds, the same number for every thread
        threads = torch.get_num_threads()
        run = min(B, max(1, CPU_ELEMENTS // max(1, R * C * threads)) * threads)
    work = (x_BRC.new_empty(run, R, C), x_BRC.new_empty(run, n, n), x_BRC.new_empty(run, n, n))
    for part in x_BRC.split(run):
        part.div_(torch.linalg.vector_norm(part, dim=(1, 2), keepdim=True).mul_(margin).add_(EPS))
        _iterate_(part, steps, *(one[: len(part)] for one in work))
    return x_BRC


def _iterate_(x_BRC: Tensor, steps: list[Quintic], other_BRC: Tensor, gram_Bnn: Tensor, poly_Bnn: Tensor) -> None:
    """x <- a x + (b G + c G G) x with G = x x'; from the right, with x' x, where x is tall (n: the smaller of R and C)."""
    source, target = x_BRC, other_BRC
    is_tall = x_BRC.shape[1] > x_BRC.shape[2]
    for a, b, c in steps:
        torch.bmm(*((source.mT, source) if is_tall else (source, source.mT)), out=gram_Bnn)
        torch.baddbmm(gram_Bnn, gram_Bnn, gram_Bnn, beta=b, alpha=c, out=poly_Bnn)
        torch.baddbmm(source, *((source, poly_Bnn) if is_tall else (poly_Bnn, source)), beta=a, out=target)
        source, target = target, source
    if source is not x_BRC:
        x_BRC.copy_(source)
