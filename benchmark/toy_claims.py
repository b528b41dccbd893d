"""The papers' claims, one by one, against what toy_study.py measured (numbered as in the project's facts sheet).

"Seen" is a rule, not an opinion: a difference counts where it is more than two of its standard errors from zero.
"""

import statistics

import table
from toy_tables import PAIRS, SHOTS, Figures, at_equal_id, control, drops, few, knob, proreg_name, short, show


def error(difference: tuple) -> str:
    return table.cell(*difference[:2], 1, "+")


def minus(difference: tuple) -> tuple:
    mean, se, n = difference
    return (-mean if mean is not None else None, se, n)


def seen(difference: tuple) -> str:
    """Is the difference above zero?"""
    mean, se, _ = difference
    if mean is None or se is None:
        return "not measured"
    return "**yes**" if mean > 2 * se else "**the reverse**" if mean < -2 * se else "**no** (within 2 se)"


def join(differences: dict) -> str:
    return "; ".join(f"{name}: {error(difference)}" for name, difference in differences.items() if difference[2])


def verdicts(differences: dict) -> str:
    return "; ".join(f"{name}: {seen(difference)}" for name, difference in differences.items() if difference[2])


def prograd(b2n: Figures, controls: Figures, f: Figures, curves: Figures) -> list[list[str]]:
    def gain(shots, a="ProGrad", b="CoOp", init="template"):
        other = b if b == "zero-shot" else few(b, 0.0, init)
        return f.diff(few(a, 0.0, init), other, "all", shots=shots)

    rows = []

    over = {f"{m} - zero-shot at {k}": gain(k, m, "zero-shot") for m in ("CoOp", "ProGrad") for k in (1, 2)}
    below = [t for t in f.tasks if (f.diff(few("CoOp"), "zero-shot", "all", t, shots=1)[0] or 0) < 0]
    still = [t for t in f.tasks if (f.diff(few("ProGrad"), "zero-shot", "all", t, shots=1)[0] or 0) < 0]
    text = f"{join(over)}; at 1 shot CoOp is below on {len(below)}, ProGrad on {len(still)} of {len(f.tasks)} tasks"
    verdict = f"CoOp below: {seen(minus(gain(1, 'CoOp', 'zero-shot')))}"
    verdict += f"; ProGrad above CoOp: {seen(gain(1))}"
    rows.append(["1", "CoOp at 1-2 shots can end below zero-shot; ProGrad does not", text, verdict + " (1 shot)"])

    lost = {m: {s: drop for s, (drop, _) in seeds.items()} for m, seeds in drops(curves).items()}
    text = "; ".join(f"{method}: {show(values)}" for method, values in lost.items())
    verdict = f"CoOp loses more: {seen(table.paired(lost['CoOp'], lost['ProGrad']))}"
    rows.append(["2", "CoOp peaks early and declines; ProGrad is flat", f"highest - last, {text}", verdict])

    by_seed = {}
    for k in (1, 16):
        ours, coop = (f.get(few(m), "all", shots=k) for m in ("ProGrad", "CoOp"))
        by_seed[k] = {seed: ours[seed] - coop[seed] for seed in ours}
    shrinks = table.paired(by_seed[1], by_seed[16])
    random = join({k: gain(k, init="random") for k in (1, 4, 16)})
    random += f.share(few("CoOp", 0.0, "random"), "all", 1)
    text = f"gain by shots: {join({k: gain(k) for k in SHOTS})}. From a random start: {random}"
    verdict = f"{seen(shrinks)} (at 1 shot - at 16: {error(shrinks)})"
    rows.append(["3", "ProGrad's gain over CoOp shrinks with shots", text, verdict])

    added, better = {k: gain(k, "CE + KL") for k in SHOTS}, {k: gain(k, "ProGrad", "CE + KL") for k in SHOTS}
    text = f"CE + KL - CoOp by shots: {join(added)}. ProGrad - CE + KL: {join(better)}"
    verdict = f"KL helps at 1: {seen(added[1])}; hurts at 16: {seen(minus(added[16]))}"
    verdict += f"; ProGrad above it at 1: {seen(better[1])}, at 16: {seen(better[16])}"
    rows.append(["4", "Adding KL helps at few shots and hurts at 8 and 16; ProGrad is better", text, verdict])

    coop, own = control("CoOp", 0.0), control()
    thirds = {"CoOp": coop, "ProGrad": own}
    thirds = {
        m: ", ".join(show(controls.process(name, "cosine", part)) for part in range(3)) for m, name in thirds.items()
    }
    text = "cosine by thirds of training, " + "; ".join(f"{method}: {values}" for method, values in thirds.items())
    verdict = table.paired(controls.process(coop, "cosine"), controls.process(own, "cosine"))
    claim = "The gradients' cosine is about 0 for CoOp, negative for ProGrad late in training"
    rows.append(["5", claim, text, f"lower for ProGrad: {seen(verdict)}"])

    better = controls.diff(control("ProGrad++", teacher="ensemble"), own, "H")
    text = f"H, ensemble - template teacher: {error(better)}; wrong teachers were not tried"
    rows.append(["6", "A better teacher makes a better ProGrad", text, seen(better)])

    sweep = {0.0: coop, 0.3: control(lam=0.3), 0.6: control(lam=0.6), 0.8: control(lam=0.8), 1.0: own}
    best = []
    for task in controls.tasks:
        means = {lam: statistics.fmean(controls.get(name, "base", task).values()) for lam, name in sweep.items()}
        zero_shot = statistics.fmean(controls.get("zero-shot", "base", task).values())
        best.append(f"{short(task)} (zero-shot {zero_shot:.0f}): {max(means, key=means.get):g}")
    less = controls.diff(control(lam=0.8), own, "base")
    text = f"λ of the highest base accuracy at 16 shots: {'; '.join(best)}. λ 0.8 - λ 1, base: {error(less)}"
    rows.append(
        ["7", "λ < 1 is better far from what CLIP knows, at many shots", text, f"mean over tasks: {seen(less)}"]
    )

    h, new = b2n.diff("ProGrad", "CoOp", "H"), b2n.diff("ProGrad", "zero-shot", "new")
    text = f"ProGrad - CoOp, H: {error(h)}; ProGrad - zero-shot, new: {error(new)}"
    claim = "ProGrad improves H over CoOp (its new accuracy stays below zero-shot's in others' reruns)"
    rows.append(["8", claim, text, f"{seen(h)}; new below zero-shot: {seen(minus(new))}"])
    return rows


def proreg(f: Figures, choices: dict) -> list[list[str]]:
    grid, chosen = choices["grid"]["proreg"], choices["chosen"]["proreg"]

    def diff(a, b, test="H"):
        return f.diff(a, b, test, shots="all")

    def name(loss, rule):
        if rule != "best on test":
            return proreg_name(loss, chosen[loss][rule], None)
        names = [proreg_name(loss, {"alpha": point["alpha"]}, None) for point in grid[loss]]
        return max(names, key=lambda name: statistics.fmean(f.get(name, "H", shots="all").values()))

    rows, tuned, plain, ten = [], proreg_name("fine-tuning", {}, None), "ProReg, power 1", "ProReg, power 10"
    up, down = diff(tuned, "zero-shot", "ID"), diff(tuned, "zero-shot", "mean OOD")
    text = f"fine-tuning - zero-shot, ID: {error(up)}, mean OOD: {error(down)}"
    for other in ("zero-shot", tuned):
        found = {test: diff(name(plain, "by H"), other, test) for test in ("ID", "mean OOD", "H")}
        text += f". ProReg (power 1, α by H) - {'fine-tuning' if other == tuned else other}, {join(found)}"
    above = {
        other: diff(name(plain, "by H"), tuned if other == "fine-tuning" else other)
        for other in ("fine-tuning", "zero-shot")
    }
    verdict = f"ID up: {seen(up)}; OOD down: {seen(minus(down))}; ProReg's H above: {verdicts(above)}"
    rows.append(["9", "Fine-tuning: ID up, OOD down; ProReg: both high", text, verdict])

    rules = ("by ID", "by H", "best on test")
    against = {
        loss: {f"α {rule}": diff(name(loss, rule), name("fixed KD", rule)) for rule in rules} for loss in (plain, ten)
    }
    text = ". ".join(f"{loss} - fixed KD, H, {join(found)}" for loss, found in against.items())
    equal = {f"α {rule}": at_equal_id(f, grid, name(plain, rule), "fixed KD") for rule in rules}
    text += f". Mean OOD at ProReg's ID accuracy, power 1 - fixed KD: {join(equal)}"
    verdict = f"H: {verdicts(against[plain])}. OOD at equal ID: {verdicts(equal)}"
    rows.append(["10", "The adaptive weight beats any fixed one", text, verdict])

    weights = []
    for loss in (plain, ten):
        mean, share = (show(f.process(name(loss, "by H"), key)) for key in ("w_mean", "w_above_half"))
        weights.append(f"{loss}: mean w {mean}, share of w above 0.5 {share}")
    same = diff(name(ten, "by H"), tuned)
    text = "; ".join(weights) + f". Power 10 - fine-tuning, H: {error(same)}"
    claim = "Power 10 distils only where the teacher is right and sure"
    less = table.paired(*(f.process(name(loss, "by H"), "w_mean") for loss in (plain, ten)))
    rows.append(["11", claim, text, f"mean w lower than with power 1: {seen(less)}"])
    return rows


def vpt(chosen: Figures, long: Figures, sweeps: Figures, contexts: dict[int, str]) -> list[list[str]]:
    settings, rows = {"chosen setting": chosen, "trained long": long}, []
    gains = {f"{a}, {name}": f.diff(a, b, "new") for a, b in PAIRS for name, f in settings.items()}
    text = f"VPT - its base, new classes: {join(gains)}"
    rows.append(["12", "A distribution raises new-class accuracy over its deterministic base", text, verdicts(gains)])

    text = ""
    for test in ("base", "new"):
        text += f"{test}, L - 10 samples: {join({L: sweeps.diff(knob(L), knob(10), test) for L in (1, 2, 5, 20)})}. "
    mean = {L: sweeps.diff(f"{knob(L)}: mean_residual", knob(L), "new") for L in (1, 10)}
    worse = {f"L = {L} worse on new": minus(sweeps.diff(knob(L), knob(10), "new")) for L in (1, 2)}
    text += f"Mean residual - samples, new, by L: {join(mean)}"
    rows.append(["13", "The global posterior needs 5 samples or more", text, verdicts(worse)])

    longer, plain = {}, "CoOp (as VPT's)"
    for L, method in ((8, "VPT global"), (0, plain)):
        for m, words in list(contexts.items())[1:]:
            difference = sweeps.diff(knob(L, words=words, name=method), knob(L, name=method), "new")
            longer[f"{method}, M = {m}"] = difference
    lower = {name: minus(difference) for name, difference in longer.items()}
    rows.append(["14", "A longer context lowers new accuracy", f"new, M - M = 4: {join(longer)}", verdicts(lower)])

    kl = {k: sweeps.diff(knob(kl=k), knob(), "H") for k in (0.0, 0.1, 1.0)}
    sigma = ", ".join(f"{k:g}: {show(sweeps.process(knob(kl=k), 'sigma'))}" for k in (0.0, 0.001, 0.1, 1.0))
    text = f"H, weight - 0.001: {join(kl)}. σ in the last third, by weight: {sigma}"
    rows.append(["15", "The KL weight matters little at 0.001", text, f"0 is another H than 0.001: {seen(kl[0.0])}"])

    over = {f"{a}, {name}": f.diff(a, "zero-shot", "new") for a, _ in PAIRS for name, f in settings.items()}
    claim = "VPT improves little over zero-shot CLIP on new classes (+0.7 in the paper)"
    rows.append(["16", claim, f"VPT - zero-shot, new: {join(over)}", verdicts(over)])
    return rows


def page(claims: list[list[str]]) -> str:
    text = "# The papers' claims on the toy world\n\nDifferences are means over tasks, paired seed by seed, ± their "
    text += "standard error over seeds. Seen: above zero by more than two standard errors. tables.md has each task.\n\n"
    return text + table.markdown(["", "claim", "measured", "seen"], claims) + "\n"
