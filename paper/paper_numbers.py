"""
Table 3's task accuracies as the paper prints them. Its parameters, perplexities and averages are model.TABLE_3.
"""

TASK_ACCURACY = {  # %, 5-shot: ARC-c, ARC-e, HellaSwag, OpenBookQA, PIQA, WinoGrande
    "base": (30.97, 63.38, 42.02, 33.60, 67.30, 51.54),
    "gated": (30.89, 64.69, 42.73, 34.00, 67.14, 53.35),
    "resformer": (33.62, 64.86, 43.49, 34.40, 68.88, 52.64),
    "naive": (32.94, 64.52, 43.47, 32.60, 68.34, 52.64),
    "nuresformer_qknorm": (31.74, 64.27, 43.83, 33.00, 68.23, 52.41),
    "nuresformer_qknorm_headwise": (34.73, 64.06, 44.45, 34.20, 67.57, 53.04),
    "nuresformer_qknorm_scalar": (32.85, 66.08, 43.87, 34.20, 68.28, 53.67),
    "nuresformer_vg": (32.42, 64.94, 43.80, 35.00, 67.52, 51.54),
    "nuresformer_vg_headwise": (31.23, 64.18, 43.50, 34.00, 67.68, 54.06),
    "nuresformer_vg_scalar": (31.83, 64.44, 43.66, 34.80, 68.44, 52.49),
    "nuresformer": (33.70, 65.07, 44.23, 33.60, 68.34, 53.12),
    "nuresformer_headwise": (33.79, 65.11, 44.09, 33.40, 67.41, 52.72),
    "nuresformer_scalar": (32.42, 64.02, 43.93, 33.20, 67.90, 53.20),
    "exo_nonorm": (32.08, 63.76, 43.49, 34.40, 68.77, 55.64),
    "exo_dynamic": (33.36, 65.87, 44.54, 34.40, 68.28, 55.17),
    "exo": (34.73, 64.65, 44.28, 36.40, 67.74, 53.59),
    "exo_headwise": (32.17, 65.87, 44.00, 32.40, 68.23, 54.06),
    "exo_scalar": (32.17, 65.66, 44.33, 33.60, 68.06, 51.14),
}
