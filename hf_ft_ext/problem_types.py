"""Problem types of classifiers, as in `problem_type` of transformers' configurations."""

CLASSIFICATION = "single_label_classification"
REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"
