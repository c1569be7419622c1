"""What yes-scores tell beside the answers: AUC, and what the best single threshold would reach.

    numbers = calibration(questions, {(image, question): score})        # {"auc", "best_threshold"}
"""
import numpy as np


def calibration(questions, yes_scores):
    """AUC of the yes-scores, and the accuracy of the threshold that is best on these very
    questions.
    """
    x = np.array([yes_scores[q["image"], q["text"]] for q in questions])
    label = np.array([q["label"] == "yes" for q in questions])
    order = np.argsort(x, kind="stable")
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]                # ties share their mean rank
    positive, negative = label.sum(), (~label).sum()
    rank_sum = rank[label].sum() - positive * (positive + 1) / 2
    auc = rank_sum / max(1, positive * negative)                        # Mann-Whitney
    # Threshold behind the k smallest: those said no, the others yes. Only between different scores.
    right_no = np.concatenate(([0], np.cumsum(~label[order])))
    right_yes = positive - np.concatenate(([0], np.cumsum(label[order])))
    possible = np.concatenate(([True], np.diff(x[order]) > 0, [True]))
    best = (right_no + right_yes)[possible].max()
    return {"auc": 100 * float(auc), "best_threshold": 100 * float(best) / len(label)}
