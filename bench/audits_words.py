"""What docs/results.md says between the tables of audits."""

from __future__ import annotations

HEAD = """
# Results

What each lock is worth against each kind of thief, measured by the [audit](audit.md). This page is written by

    python bench/audits.py -d WORK --zoo PATH --docs docs/results.md

(with `--only NAME --budget MINUTES` for audits that ran under a budget);
attack suite {suite}, unmergeable {tool}, seed {seed};
{machine}; two workers of one thread.
Nothing here is tuned on the test half: merges are chosen on validation examples and reported on others. Examples:

{slices}

One lock a method and one seed of everything: intervals are of examples, not of keys, and a second key gives other
figures. The models are small; nothing says that larger ones behave alike.{missing}
"""
RECOVERED = """
`level n`: the part of what the unprotected model would give a thief with this access that the locked one gives him
(*recovered*), with its 95 % interval; 0 is full protection, 1 is none. *alone*: score of the protected model by
itself, accuracy or minus nats a token.

`mergelock` acts on attention alone. What keeps a model's large entries (`tall_mask`, `projected`, `mergekit:sce`) takes
the locked attention whole and merges the MLPs: such merges are why more of it is recovered off the shelf than of the
others.

An `exact` lock comes off whole for whoever aligns it.

A budget flatters a lock: what it left out may be what gets through. Read the rows above that one cut short so.
"""
SCENARIOS = """
The audit has to be able to say that everything is lost. Here it must, but for the thief at level 0 who has two
releases of one model, each locked by itself. Gains: summed over the floors with the protected model, of those with
models that were never locked.
"""
METHODS_HEAD = """
## Off the shelf, method by method

Joint of every merge method: the best worse of the protected task's value and the worst own one, chosen on
validation examples. 0 is the base, 1 the fine-tunes. A dash: refused or failed.
"""
CLAIMS = """
## The papers' claims beside these figures

MergeLock (arXiv 2509.01548) says of its locks that performance degrades "by over 95 % in most cases" when models are
merged. PaRaMS (arXiv 2503.07661) tests three forms of multi-head scaling, diagonal, symmetric and non-symmetric, with
its rearrangement of MLP rows. Of the merge methods that work without a lock (joint of .10 or more), how many lose
over 95 % of it, and what the best one keeps:
"""
PUBLISHED_HEAD = """
Published figures, not ours: accuracy in per cent of the protected task, CLIP ViT-B/32, task arithmetic at λ = .2,
before and after the base-anchored attack of arXiv 2606.30360, which reports them. Their models and data were not at
hand; the pattern is the one above: a lock ends merges off the shelf, and an anchor brings them back.
"""
COSTS = """
`exact` on the embedded zoo, the merge with the best worse of both values of every attack. Forward passes: of one
example through one model, looking for the best merge and what led there included; a step of training counts as three.
Inputs and labelled: examples beyond those that merges are chosen on. Size: of the result, over one model.
"""
CLOCKS = """
## How long an audit takes

From nothing, not a row known: `python bench/audits.py -d NEW --zoo PATH --only NAME --top 1 --timed`.
"""
OLDER = """
† of earlier rules: measured before what undoes a lock was tried ahead of what damages the model, and while attacks
that did not prove themselves counted as others do. Both made a lock look better.
"""
EARLIER = """
## Earlier measurements once more

What this package was built on, measured again by other code (`bench/zoo_tables.py`): one ViT of the measuring zoo,
fmnist against mnist and cyr. Best merges by the worse of (the value of fmnist, the least value of the other two),
chosen on the images they are reported on; averages and wide merges at fixed coefficients of fmnist, mnist, cyr and
the base, with the mean of the other two. An audit does neither; these are here to be compared.

{tables}

Before: without a lock .28, .59 by task arithmetic and .51, .43 at the full dose, `exact` −.01, .09 and 1.0, −.21,
with scales −.05, −.06 and .96, −.23, `params` −.79, −.35 and .68, −.16, `gauge` −.03, −.04 and .97, −.22,
`mergelock` without a cap −2.2, −1.1 and −2.1, −1.1; after alignment to another fine-tune by itself 1.0, averaged
.39, .52 against .41, .52 unlocked; wide .70, .47 and .32, .57.

Differences above .05, and why:

- What a locked model's merges give differs by up to .35 for `params` and .22 for `exact`: a lock is a random draw,
  and the merges of another draw are broken in another way. No draw leaves a joint above 0. What depends on no draw,
  the rows `none`, *aligned*, *never locked* and *wide*, agrees to .03.
- The scales of `exact --scales` move the model less far here (15 times the distance of the fine-tune, 27 before):
  the earlier lock also chose, of several orders of MLP rows, the one least like the base.
- `mergelock` at condition 1e6 is 2,800 times as far from the base, before 160,000, and moves outputs by .17, before
  by .016. Rounding grows with the condition, which here is near 1e6 in every matrix; random ones without a cap are
  of less condition, but for the worst of them, and were multiplied by scales, which made them large.
- Rotations alone (−.10, .07 and .67, .01 then) have no row: no method draws from that group by itself.
"""
DOUBTS = """
## What is not counted

Attacks that could not be believed or did not apply, over all audits of this page. None of them counts as protection.
"""
