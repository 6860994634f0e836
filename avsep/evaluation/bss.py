"""BSS-eval version 3 (SDR, SIR, SAR with 512-tap distortion filters) and SI-SDR, batched, in float64 PyTorch.

An estimate is projected onto the delays 0..511 of its own reference (P_j) and onto those of all references (P_all)::

    s_target = P_j s        e_interf = P_all s - P_j s        e_artif = s - P_all s
    SDR = |s_target|^2 / |e_interf + e_artif|^2
    SIR = |s_target|^2 / |e_interf|^2
    SAR = |s_target + e_interf|^2 / |e_artif|^2

Sources: Vincent, Gribonval, Févotte, IEEE TASLP 14(4), 2006, section III.B; Vincent et al., Signal Processing 92, 2012.
SI-SDR: Le Roux, Wisdom, Erdogan, Hershey, ICASSP 2019, equation 3. The order of the sources is given, never searched.

Numerics, in the order of the computation:

* Correlations by FFT, of a length without time aliasing; each signal is first scaled to unit energy, so the Gram matrix
  has a unit diagonal and every tolerance below is relative to each signal's own energy.
* The Gram matrix is factored by Cholesky, never by LU: on some CPUs the threaded LU behind ``torch.linalg.solve`` and
  ``inv`` returns wrong numbers without an error. The factor of the first reference alone is the leading block of the
  factor of all of them.
* Where the factorisation fails, because the references are tonal, band-limited or of low rank within rounding, the
  first of :data:`JITTERS` that helps is added to the diagonal, and the projection is then refined (iterated Tikhonov)
  against the signals themselves, which leaves it as without the jitter wherever the data decide it.
  ``BssResult.jitter`` says what was added.
* The energies are those of the projected signals, not quadratic forms of the solution: an error of the filters
  enters them only to second order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from avsep.errors import DataError, NumericalError

__all__ = [
    "DUPLICATE_TOLERANCE",
    "JITTERS",
    "LIMIT_DB",
    "SILENCE",
    "BssResult",
    "bss_eval",
    "mixture_baseline",
    "sdr_alone",
    "sdr_improvement",
    "si_sdr",
]

LIMIT_DB = 100.0
"""Ratios are clipped to ±100 dB: a perfect estimate gives 100, where the formula gives infinity or rounding noise."""

SILENCE = 1e-5
"""A signal whose absolute samples sum to no more than this is silent (the published evaluation's rule)."""

DUPLICATE_TOLERANCE = 1e-6
"""Two references are duplicates when some delay within the filter length correlates them to 1 - this or more."""

JITTERS = (1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
"""What is added to the Gram matrix's unit diagonal when it cannot be factored, tried in this order."""

_REFINEMENTS = 3
_BLOCK = 128  # of the blocked Cholesky; 64 to 384 were equally fast
_MEMORY_BYTES = 64 * 2**20  # of the spectra of one chunk of mixtures; larger ones are slower, being out of the caches


@dataclass(frozen=True)
class BssResult:
    """Scores of a batch of B mixtures of N sources; all tensors are float64 in dB, on the CPU, unless said otherwise.

    ``sdr``, ``sir``, ``sar`` [B, N]. NaN where undefined: for a source whose reference or estimate is silent, and, for
    SIR and SAR, for all sources of a mixture with duplicate references, which leave interference without a meaning
    (SDR does not compare the references and stays).
    ``sdr_mixture`` [B, N] or None: the SDR of the mixture itself taken as the estimate.
    ``silent`` [B, N] bool: the reference or the estimate is silent.
    ``duplicates``: (mixture, source, source) for each pair of duplicate references.
    ``jitter`` [B]: what was added to the diagonal of the Gram matrix, 0 where nothing was needed.
    """

    sdr: Tensor
    sir: Tensor
    sar: Tensor
    silent: Tensor
    jitter: Tensor
    duplicates: tuple[tuple[int, int, int], ...] = ()
    sdr_mixture: Tensor | None = None

    @property
    def status(self) -> tuple[str, ...]:
        """Per mixture: ``ok``, ``silent`` (some source is) or ``degenerate`` (duplicate references)."""
        doubled = {d[0] for d in self.duplicates}
        return tuple(
            "silent" if quiet else "degenerate" if b in doubled else "ok"
            for b, quiet in enumerate(self.silent.any(dim=1).tolist())
        )


def bss_eval(
    references: Tensor,
    estimates: Tensor,
    filter_length: int = 512,
    *,
    mixture: Tensor | None = None,
    duplicates: Literal["flag", "raise"] = "flag",
    interference: bool = True,
) -> BssResult:
    """SDR, SIR and SAR of ``estimates`` [B, N, L] against ``references`` [B, N, L], source by source in their order.

    With ``mixture`` [B, L] the SDR of the mixture as the estimate of each source is given too, at little extra cost.
    Without ``interference`` SIR and SAR, which cost most, are left out, and NaN.
    Equal to ``mir_eval.separation.bss_eval_sources(..., compute_permutation=False)``, but for the clipping to
    ±:data:`LIMIT_DB` and the defined outcomes of :class:`BssResult` for silence and duplicate references. The inputs
    may have any real dtype; the computation is float64 on their device (tuned and tested on the CPU).

    Raises :class:`~avsep.errors.NumericalError`, naming the signal, for a NaN or an infinity;
    :class:`~avsep.errors.DataError`, naming the pair, for duplicate references with ``duplicates="raise"``; ValueError
    for shapes that do not fit.
    """
    _check_shapes(references, estimates)
    if filter_length < 1:
        raise ValueError(f"filter_length must be at least 1, got {filter_length}")
    batch, sources, samples = references.shape
    if mixture is not None and mixture.shape != (batch, samples):
        raise ValueError(f"mixture must be [B, L] = {(batch, samples)}, got {tuple(mixture.shape)}")
    _check_finite("references", references)
    _check_finite("estimates", estimates)
    if mixture is not None:
        _check_finite("mixture", mixture)

    size = _fft_size(samples + filter_length - 1)
    chunk = max(1, _MEMORY_BYTES // _bytes_per_mixture(sources, size))
    parts = []
    for first in range(0, batch, chunk):
        last = min(first + chunk, batch)
        part = _score(
            references[first:last].double(),
            estimates[first:last].double(),
            None if mixture is None else mixture[first:last].double(),
            filter_length,
            size,
            interference,
        )
        parts.append(part)
    if not parts:
        empty = torch.empty(0, sources, dtype=torch.float64)
        none = None if mixture is None else empty
        return BssResult(empty, empty, empty, empty.bool(), torch.empty(0, dtype=torch.float64), (), none)

    pairs = []
    for index, part in enumerate(parts):
        pairs += [(index * chunk + b, i, j) for b, i, j in part.duplicates]
    if pairs and duplicates == "raise":
        b, i, j = pairs[0]
        raise DataError(
            f"mixture {b}: references {i} and {j} are the same signal, so its SIR and SAR are undefined: "
            "leave such pairs out of the list of mixtures"
        )
    return BssResult(
        sdr=torch.cat([p.sdr for p in parts]),
        sir=torch.cat([p.sir for p in parts]),
        sar=torch.cat([p.sar for p in parts]),
        silent=torch.cat([p.silent for p in parts]),
        jitter=torch.cat([p.jitter for p in parts]),
        duplicates=tuple(pairs),
        sdr_mixture=None if mixture is None else torch.cat([p.sdr_mixture for p in parts if p.sdr_mixture is not None]),
    )


def mixture_baseline(references: Tensor, mixture: Tensor | None = None, filter_length: int = 512) -> Tensor:
    """[B, N] SDR in dB of ``mixture`` [B, L] (default: the sum of the references) as the estimate of every source."""
    if mixture is None:
        mixture = references.sum(dim=-2)
    # the estimates are not looked at here; the references stand in for them
    scores = bss_eval(references, references, filter_length, mixture=mixture).sdr_mixture
    assert scores is not None
    return scores


def sdr_improvement(
    references: Tensor, estimates: Tensor, mixture: Tensor | None = None, filter_length: int = 512
) -> Tensor:
    """[B, N] SDRi in dB: SDR of ``estimates`` less that of ``mixture`` [B, L] (default: the references' sum)."""
    if mixture is None:
        mixture = references.sum(dim=-2)
    scores = bss_eval(references, estimates, filter_length, mixture=mixture)
    assert scores.sdr_mixture is not None
    return scores.sdr - scores.sdr_mixture


def sdr_alone(references: Tensor, estimates: Tensor, filter_length: int = 512) -> Tensor:
    """SDR [B, E, N] in dB of several sets of ``estimates`` [B, E, N, L] against the same ``references`` [B, N, L].

    The SDR of :func:`bss_eval`, whose SIR and SAR are not wanted: it compares no reference with another, so that each
    costs one small factorisation, which all E estimates share. NaN where the reference or the estimate is silent.

    Raises NumericalError as :func:`bss_eval` does; ValueError for shapes that do not fit.
    """
    if estimates.ndim != 4 or references.ndim != 3 or estimates[:, 0].shape != references.shape:
        raise ValueError(
            f"references must be [B, N, L] and estimates [B, E, N, L], got {tuple(references.shape)} and "
            f"{tuple(estimates.shape)}"
        )
    _check_finite("references", references)
    _check_finite("estimates", estimates)
    batch, sets, sources, samples = estimates.shape
    size = _fft_size(samples + filter_length - 1)
    found = torch.full((batch, sets, sources), math.nan, dtype=torch.float64)
    buffer = torch.empty(filter_length, filter_length, dtype=torch.float64, device=references.device)
    for b in range(batch):
        for n in range(sources):
            reference, queries = references[b, n].double(), estimates[b, :, n].double()  # [L], [E, L]
            quiet = _is_silent(reference[None])
            if bool(quiet):
                continue
            reference_f = torch.fft.rfft(_unit_energy(reference[None]), n=size)  # [1, K]
            query_f = torch.fft.rfft(_unit_energy(queries), n=size)  # [E, K]
            lags = _reference_correlations(reference_f[None], filter_length, size)[0]
            factor = _Factor(lags, quiet, filter_length, buffer)
            right = _project_back(reference_f, query_f, filter_length, size)  # [1, E, taps]
            target = _apply(_solve(factor, right, reference_f, query_f, filter_length, size), reference_f, size)
            ratio = _ratio_db(_energy(target), _energy(query_f - target))
            found[b, :, n] = ratio.masked_fill(_is_silent(queries), math.nan).cpu()
    return found


def si_sdr(references: Tensor, estimates: Tensor, *, zero_mean: bool = False) -> Tensor:
    """Scale-invariant SDR [B, N] in dB (Le Roux et al., 2019, equation 3), clipped to ±:data:`LIMIT_DB`.

    ``references`` and ``estimates`` are [B, N, L]; ``zero_mean`` takes each signal's mean away first. NaN where the
    reference or the estimate is silent. Raises NumericalError, naming the signal, for a NaN or an infinity.
    """
    _check_shapes(references, estimates)
    _check_finite("references", references)
    _check_finite("estimates", estimates)
    silent = _is_silent(references) | _is_silent(estimates)  # [B, N]
    references, estimates = references.double(), estimates.double()
    if zero_mean:
        references = references - references.mean(dim=-1, keepdim=True)
        estimates = estimates - estimates.mean(dim=-1, keepdim=True)
    references, estimates = _unit_energy(references), _unit_energy(estimates)
    target = (references * estimates).sum(dim=-1, keepdim=True) * references
    ratio = _ratio_db(target.square().sum(dim=-1), (estimates - target).square().sum(dim=-1))
    return ratio.masked_fill(silent, math.nan).cpu()


# --- one chunk --------------------------------------------------------------------------------------------------------


def _score(
    references: Tensor, estimates: Tensor, mixture: Tensor | None, taps: int, size: int, interference: bool
) -> BssResult:
    """Scores of float64 ``references``, ``estimates`` [B, N, L] and ``mixture`` [B, L] with FFTs of ``size`` points."""
    batch, sources, _ = references.shape
    quiet = _is_silent(references)  # [B, N]
    silent = quiet | _is_silent(estimates)
    # A silent reference spans nothing: its block of the Gram matrix becomes the identity and its filter zero.
    reference_f = torch.fft.rfft(_unit_energy(references).masked_fill(quiet[..., None], 0.0), n=size)  # [B, N, K]
    queries = estimates if mixture is None else torch.cat([estimates, mixture[:, None]], dim=1)
    query_f = torch.fft.rfft(_unit_energy(queries), n=size)  # [B, N (+1), K]

    lags = _reference_correlations(reference_f, taps, size)  # [B, N, N, 2 * taps - 1]
    duplicates = _find_duplicates(lags, quiet)
    cross = _project_back(reference_f, query_f, taps, size)  # [B, N, N (+1), taps]
    # which queries are projected onto which references: estimate j (and the mixture) onto reference j ...
    own = [[j] if mixture is None else [j, sources] for j in range(sources)]
    own_filters = cross.new_empty(batch, sources, len(own[0]), taps)
    # ... and every estimate onto all of them
    all_filters = cross.new_empty(batch, sources, sources, taps)  # [B, estimate, reference, taps]
    jitter = cross.new_zeros(batch)
    buffer = cross.new_empty(sources * taps, sources * taps)
    for b in range(batch):
        # One mixture at a time in one buffer: LAPACK would do so anyway, and the fresh pages of a whole batch of
        # matrices cost more than the factorisation.
        factor = None
        if interference:
            factor = _Factor(lags[b], quiet[b], taps, buffer)
            jitter[b] = factor.jitter
            all_filters[b] = _solve(factor, cross[b, :, :sources], reference_f[b], query_f[b, :sources], taps, size)
        for j, columns in enumerate(own):
            # a leading block of a Cholesky factor is that block's own factor, so the first reference needs no new one
            single = (
                factor.leading(taps)
                if factor is not None and j == 0
                else _Factor(lags[b, j:, j:], quiet[b, j : j + 1], taps, buffer)
            )
            jitter[b] = max(jitter[b].item(), single.jitter)
            here = slice(j, j + 1)
            solved = _solve(single, cross[b, here, columns], reference_f[b, here], query_f[b, columns], taps, size)
            own_filters[b, j] = solved[:, 0]

    sdr, sir, sar, base = [], [], [], []
    for j in range(sources):
        whole = query_f[:, j]
        target = _apply(own_filters[:, j, :1], reference_f[:, j : j + 1], size)  # P_j of estimate j
        signal = _energy(target)
        sdr.append(_ratio_db(signal, _energy(whole - target)))
        if interference:
            spanned = _apply(all_filters[:, j], reference_f, size)  # P_all of estimate j: [B, K]
            sir.append(_ratio_db(signal, _energy(spanned - target)))
            sar.append(_ratio_db(_energy(spanned), _energy(whole - spanned)))
        else:
            sir.append(torch.full_like(sdr[-1], math.nan))
            sar.append(sir[-1])
        if mixture is not None:
            target = _apply(own_filters[:, j, 1:], reference_f[:, j : j + 1], size)  # P_j of the mixture
            base.append(_ratio_db(_energy(target), _energy(query_f[:, sources] - target)))

    doubled = torch.zeros(batch, 1, dtype=torch.bool, device=references.device)
    for b, _, _ in duplicates:
        doubled[b] = True
    no_base = quiet if mixture is None else quiet | _is_silent(mixture)[:, None]
    return BssResult(
        sdr=torch.stack(sdr, dim=1).masked_fill(silent, math.nan).cpu(),
        sir=torch.stack(sir, dim=1).masked_fill(silent | doubled, math.nan).cpu(),
        sar=torch.stack(sar, dim=1).masked_fill(silent | doubled, math.nan).cpu(),
        silent=silent.cpu(),
        jitter=jitter.cpu(),
        duplicates=duplicates,
        sdr_mixture=torch.stack(base, dim=1).masked_fill(no_base, math.nan).cpu() if base else None,
    )


def _reference_correlations(reference_f: Tensor, taps: int, size: int) -> Tensor:
    """c_ij[k] = sum_u r_i[u] r_j[u + k] at lags k = taps-1 .. -(taps-1), for i <= j: [B, N, N, 2 * taps - 1]."""
    batch, sources, _ = reference_f.shape
    found = reference_f.real.new_zeros(batch, sources, sources, 2 * taps - 1)
    for i in range(sources):
        rows = torch.fft.irfft(reference_f[:, i, None].conj() * reference_f[:, i:], n=size)  # [B, N - i, size]
        found[:, i, i:] = torch.cat([rows[..., :taps].flip(-1), rows[..., size - taps + 1 :].flip(-1)], dim=-1)
    return found


def _find_duplicates(lags: Tensor, quiet: Tensor) -> tuple[tuple[int, int, int], ...]:
    same = lags.abs().amax(dim=-1) >= 1 - DUPLICATE_TOLERANCE  # [B, N, N]; the signals have unit energy
    same = same & ~quiet[:, :, None] & ~quiet[:, None, :]
    return tuple((b, i, j) for b, i, j in torch.nonzero(same.triu(1)).tolist())


class _Factor:
    """The Cholesky factor U (upper, gram = U^T U) of one mixture's Gram matrix, in ``buffer``; see ``JITTERS``."""

    def __init__(self, lags: Tensor, quiet: Tensor, taps: int, buffer: Tensor) -> None:
        rows = len(quiet) * taps
        self.upper = buffer[:rows, :rows]
        for amount in (0.0, *JITTERS):
            self.jitter = amount
            _fill_gram(self.upper, lags, quiet, taps, amount)
            if _cholesky_in_place(self.upper):
                return
        raise NumericalError(f"a Gram matrix of references cannot be factored, not even with {self.jitter} added to it")

    def leading(self, rows: int) -> _Factor:
        part = object.__new__(_Factor)
        part.upper, part.jitter = self.upper[:rows, :rows], self.jitter
        return part

    def solve(self, right: Tensor) -> Tensor:
        """Right-hand sides [M, Q, taps] to solutions [Q, M, taps]."""
        members, queries, taps = right.shape
        columns = right.transpose(1, 2).reshape(members * taps, queries)
        columns = torch.linalg.solve_triangular(self.upper.T, columns, upper=False)
        columns = torch.linalg.solve_triangular(self.upper, columns, upper=True)
        solutions: Tensor = columns.T.reshape(queries, members, taps)
        return solutions


def _fill_gram(gram: Tensor, lags: Tensor, quiet: Tensor, taps: int, jitter: float) -> None:
    """Write the Gram matrix of all delays, upper blocks only: block (i, j) is Toeplitz, [a, b] = c_ij[a - b]."""
    for i in range(len(quiet)):
        for j in range(i, len(quiet)):
            block = gram[i * taps : (i + 1) * taps, j * taps : (j + 1) * taps]
            # row a of the Hankel view [taps, taps] starts at lag taps-1-a; upside down it is the Toeplitz matrix
            block.copy_(lags[i, j].unfold(-1, taps, 1).flip(-2))
    gram.diagonal().add_(quiet.to(gram.dtype).repeat_interleave(taps) + jitter)


def _cholesky_in_place(matrix: Tensor) -> bool:
    """Turn the upper triangle of ``matrix`` [n, n] into its factor U; False when it is not positive definite.

    By blocks (Golub and Van Loan, Matrix Computations, section 4.2.9): in place, the right-looking blocked form is half
    again as fast on a CPU as one call for the whole matrix, which spends its time on clearing the other triangle.
    """
    n = matrix.shape[0]
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        corner, info = torch.linalg.cholesky_ex(matrix[first:last, first:last].T)  # reads the upper triangle as lower
        if info:
            return False
        matrix[first:last, first:last] = corner.T
        if last == n:
            break
        panel = torch.linalg.solve_triangular(corner, matrix[first:last, last:], upper=False)
        matrix[first:last, last:] = panel
        for top in range(last, n, _BLOCK):
            bottom = min(top + _BLOCK, n)
            matrix[top:bottom, top:].addmm_(panel[:, top - last : bottom - last].T, panel[:, top - last :], alpha=-1)
    return True


def _project_back(reference_f: Tensor, query_f: Tensor, taps: int, size: int) -> Tensor:
    """Correlations [..., N, Q, taps] of the delays 0..taps-1 of references [..., N, K] with queries [..., Q, K]."""
    lags: Tensor = torch.fft.irfft(reference_f[..., :, None, :].conj() * query_f[..., None, :, :], n=size)
    return lags[..., :taps]


def _solve(factor: _Factor, right: Tensor, reference_f: Tensor, query_f: Tensor, taps: int, size: int) -> Tensor:
    """Filters [Q, M, taps] that project queries [Q, K] onto the delays of references [M, K].

    ``right`` [M, Q, taps] holds their correlations.
    """
    filters = factor.solve(right)
    for _ in range(_REFINEMENTS if factor.jitter else 0):
        rest_f = query_f - _apply(filters, reference_f, size)
        filters = filters + factor.solve(_project_back(reference_f, rest_f, taps, size))
    return filters


def _apply(filters: Tensor, reference_f: Tensor, size: int) -> Tensor:
    """Spectra [..., K] of the references [..., M, K] filtered by ``filters`` [..., M, taps] and summed."""
    filters_f: Tensor = torch.fft.rfft(filters, n=size)
    total = filters_f[..., 0, :] * reference_f[..., 0, :]
    for m in range(1, filters.shape[-2]):
        total.addcmul_(filters_f[..., m, :], reference_f[..., m, :].expand_as(total))
    return total


# --- small parts ------------------------------------------------------------------------------------------------------


def _check_shapes(references: Tensor, estimates: Tensor) -> None:
    if references.ndim != 3 or references.shape != estimates.shape:
        raise ValueError(
            "references and estimates must both be [B, N, L], got "
            f"{tuple(references.shape)} and {tuple(estimates.shape)}"
        )
    if references.shape[1] < 1 or references.shape[2] < 1:
        raise ValueError(f"no sources or no samples: {tuple(references.shape)}")


def _check_finite(name: str, signals: Tensor) -> None:
    # a sum is the fastest look at every sample; only where it is not finite are they looked at one by one
    if bool(torch.isfinite(signals.sum(dim=-1, dtype=torch.float64)).all()):
        return
    bad = ~torch.isfinite(signals)
    if bool(bad.any()):
        index = torch.nonzero(bad)[0].tolist()
        where = ", ".join(map(str, index[:-1]))
        raise NumericalError(
            f"{name}[{where}] holds {signals[tuple(index)].item()} at sample {index[-1]}: scores need finite signals"
        )


def _is_silent(signals: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(signals, ord=1, dim=-1, dtype=torch.float64)
    return size <= SILENCE


def _unit_energy(signals: Tensor) -> Tensor:
    """Float64 signals scaled to unit energy over the last axis; zeros stay zeros."""
    norm = torch.linalg.vector_norm(signals, dim=-1, keepdim=True)
    if not bool(torch.isfinite(norm).all()):  # squares of more than 1e154 overflow
        signals = signals / signals.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
        norm = torch.linalg.vector_norm(signals, dim=-1, keepdim=True)
    return signals / torch.where(norm > 0, norm, torch.ones_like(norm))


def _ratio_db(signal: Tensor, noise: Tensor) -> Tensor:
    """10 log10(signal / noise) clipped to ±LIMIT_DB; 0 / 0 cannot happen for signals that are not silent."""
    return (10 * (torch.log10(signal) - torch.log10(noise))).clamp(-LIMIT_DB, LIMIT_DB)


def _energy(spectrum: Tensor) -> Tensor:
    """[B, K] -> [B]: the energy of a real signal from its half spectrum, up to the FFT's factor size / 2 (Parseval)."""
    length: Tensor = torch.linalg.vector_norm(torch.view_as_real(spectrum).flatten(1), dim=-1)
    total = length.square()
    ends = spectrum[:, 0].abs().square() + spectrum[:, -1].abs().square()  # the only bins that stand for themselves
    return total - ends / 2


def _bytes_per_mixture(sources: int, size: int) -> int:
    spectra = 2 * (sources + 1) + sources * (sources + 1) + 2 * sources  # signals, correlations, projections
    return spectra * size * 8


def _fft_size(least: int) -> int:
    """The smallest even number >= ``least`` whose prime factors are 2, 3, 5 and 7."""
    size = max(2, least + least % 2)
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2
