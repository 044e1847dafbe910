"""What docs/results.md says between the tables of hardening."""

from __future__ import annotations

HEAD = """
## Hardening

What `harden` makes of the same fine-tunes, judged by audits with models and data that hardening never saw; the
unprotected model is a control that was trained plainly for as many steps on the same data. `python bench/harden.py`
and `python bench/harden_effects.py` made what is kept in `bench/harden`; this section is written from it. Edition 1 of
what is trained had merges of the whole fine-tune with something added among those that are simulated, and a strength
that rose faster, of images from .15; edition 2 has not, and its strength rose slowly; edition 3 had no merges that are
all but the fine-tune, or with less than a tenth of it, and in `kindred` six tenths of the fine-tune as it was; edition
4 the whole of that again, and .03 for the tenth; edition 5 the merges of 2, and of images a strength that rises three
times as fast; edition 6, as it is now, asks images for the labels by half, and for the control's answers by half: the
same command makes another model now. Runs:
"""
BARS = """
*level n*: recovered, as above. *change*: of the score alone against the control's, better is positive. *recipe*: steps
× batch, and the rate. `trap` and `trap+collapse`: the objectives without a thief who chooses among blocks; `mined` and
`mined+collapse`: with him; `mined+collapse+kindred`: also with one whose own tasks are akin to the protected one, by
`--objective trap+collapse+kindred`; `kept` and `kept+collapse`: `mined` and `mined+collapse` with `--labels 0`, beside
a control that is trained on labels all the same; `…, locked`: such a model with an `exact` lock on top.
"""
DEFAULT = """
By itself `harden` has the objective of `mined+collapse+kindred` for images, with the recipe {images}, and that of
`mined` for text, with {texts} (adapters: {adapters}). Audits of both, objective and recipe: {found}.{other}
"""
OTHER_RECIPE = """
None is of the measuring ViT (`images`): its bars are of another recipe, objective or edition, or merges might keep .1.
"""
ROTATION = """
Who is protected from whom. Hardening sees the owner's stand-in, never the thief's own:
"""
TRIED = """
What every audit ran, {how} the whole suite: by level, the attacks that proved themselves by working on the control;
those that did not, whose failure says nothing; and those of `ATTACKS` in `bench/harden_cases.py` that were not run.
Numbers are seeds.
"""
SUMMARY = """
Several seeds together, 1,000 test images a task, of `embedded` 500. *aim*: whether the score alone lost at most .3
points of accuracy, or per cent of the cross-entropy, on average. *level n*: the worst seed's. Of level 2 it is row
coefficients by entropy alone, if anything: with distillation among the attacks he gets most of the task, see below.
"""
EACH = """
One by one. A λ that is too weak for a task changes nothing, and there are such rows here: that is why the strength
follows what merges keep unless it is given. ‡: of several attacks of this level one alone proved itself. §: what the
control gives by an attack that did not prove itself is in the sum, as audits counted then and no longer do: it makes
the figure too small.
"""
LABELS = """
Values of the protected task and the worst own one, (0 the base, 1 the fine-tunes), of each attack's best merge by the
worse of the two. `repair-n` trains on n labelled examples a class, `distil` on 2,048 unlabelled inputs of the task.
A thief who trains gets most of the task. Recovered over these attacks, by model and seed: {recovered}.
"""
UNLABELLED = """
All of these are of `trap` at a fixed strength: what `harden` does by itself was audited neither with labels nor with
distillation.
"""
IDEAS = """
Each idea of `bench/frontier_ideas.py` beside the trap, at one fixed strength. A cell is the protected task's value and
the worst own one. What a thief has from labels without the protected model is in the first row of a seed: an idea would
have to bring the others near it. *level 3*: recovered by all attacks of the audit, the target was .5. *gain*: what the
protected model adds to 16 labels a class; the target was half of the control's.

None reaches it in a way that holds. Repair unrolled over more steps (`unrolled-4`, `unrolled-8`) is the only idea whose
gain falls clearly with one seed, .22, .15, .09; with two more seeds it is .24 beside .21 and .19 beside .43, and the
trap by itself has .24 and .21 there. Longer horizons take more from merges without data, as `collapse` does, which is
why that one can be had as an objective. Distillation from hard answers is as good as ever with all of them, with false
or certain soft answers (`decoy`, `sharp`) too; `collapse` and unrolling make that of hidden states worse. `apart` and
`overshoot` change nothing that can be told from chance: 500 test images a task, differences below .1 say nothing.
Nor does what `harden` does by itself (seeds 0, 1, 2; `cpu-900-whole`, `cpu-900-labels`): of 16 labels a class the gain
is .14, .40, .31, of its controls .30, .40, .38. Of four labels it is .06, .05, .17 beside .33, .51, .26, by the worse
of both values: at most half with two of three seeds. By edition 6 (seeds 0, 1; `cpu-900-labels-6`) it is .13, .25 of
16, of its controls .11, .40, and of four .17, .38 beside .24, .51.
"""
OWNERS = """
Exposure: the value of the task in fixed simulated merges on held-out examples, which the fine-tune itself may have
seen in its own training. Rows of one task are to be compared with its `control`, or with *plain*: the same training
without the objective. `nasty` (h200) was an idea that trained nothing, for its divergence has no slope where training
begins; `decoy` took its place.
"""
BY_PEFT = """
Merges of the protected adapter and the thief's own by `add_weighted_adapter`, of every combination type that peft has:
values of the protected task and of his own (0 the base, 1 the adapters) on test windows, of the pair of weights that is
best by the worse of the two on others. What he has without the protected adapter is 0 or less of its task.
"""
PRICES = """
Medians of the trainings of a run on a GPU, beside the plain training of the same model and seed where the run has one.
`trap` is two simulated merges a step, three forward and backward passes for one: it has neither the best of four draws
nor `collapse`, a merge more. `mined+collapse` has both, and half of a batch for each of the trap's merges; what
`harden` does by itself for images has one merge more, of half a batch (`kindred`). Where the strength is fixed, there
are no looks at held-out examples; where it follows, they are in the time, and so is the plain training that comes
first. Peak memory as torch counts it; time with other processes on the GPU, as many as the runs say.
"""
STEPS = """
Passes forward and backward of a step with the objective that `harden` has by itself, beside plain training's
(`bench/harden_precision.py`; CPU seconds of one thread, all ways taken in turn). Looks at held-out examples, the plain
training that comes first and its answers as a teacher are not in it.
"""
ALONE = """
On test images that nobody trained on (`bench/harden_price.py`), where audits score 500 or 1,000: these are the figures
to go by. Those of clothes and digits are the test images of Fashion-MNIST and MNIST, letters are drawn as the zoo's are
in faces that it has not. ±: the standard error of the difference, over images, of letters over faces. The models of
`cpu-mined` were trained once more for it.
"""
EFFECTS = """
Of {way}. On {slice}; score: accuracy or minus nats a token; ece: expected calibration error; int8: every matrix rounded
to 255 levels, one scale a row. *further*: the score after a licensed user's own plain training from the model.
"""
# What others publish, in their own words or figures: none of it was measured here.
WORDS = "no comparable figure"
PUBLISHED = (
    (
        "Trap², arXiv 2601.21898", "CLIP ViT-B/32 and L/14; full models, LoRA",
        f"keeps the score alone, degrades merges; {WORDS}",
    ),
    ("ARF, arXiv 2606.30360", "CLIP ViT-B/32", "4.6 % of accuracy after task arithmetic, 27.4 % after its own attack"),
    ("MergeBarrier, arXiv 2511.10712", "CLIP ViT-B/32", "29.3 %, and 60.8 % after the attack of arXiv 2606.30360"),
    (
        "MergeGuard, arXiv 2511.11851", "CLIP ViT-L/14, Llama 2, Gemma 2, Mistral",
        "accuracy of merges falls by up to 90 %, alone by less than 1.5 %",
    ),
    ("TAR, arXiv 2408.00761", "language models", f"safeguards that stand hundreds of steps of fine-tuning; {WORDS}"),
    (
        "SOPHON, arXiv 2404.12699", "image models",
        f"fine-tuning costs as much as training from nothing, or more; {WORDS}",
    ),
    ("arXiv 2412.07097", "evaluation", "such claims fall to small changes of an attack: hence the attacker's best"),
)  # fmt: skip
