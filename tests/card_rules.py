"""What the Hub asks of the metadata at the head of a README.md, by its specification (modelcard.md, datasetcard.md)."""

import re
from numbers import Number

import yaml


# The identifiers of https://huggingface.co/docs/hub/repositories-licenses that this project's cards may have.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "unknown", "other"}
KNOWN = {
    "model": "language license license_name license_link library_name tags datasets metrics base_model pipeline_tag "
    "model-index inference widget model_name".split(),
    "dataset": "language license license_name license_link tags pretty_name size_categories task_categories task_ids "
    "source_datasets configs dataset_info annotations_creators language_creators multilinguality viewer".split(),
}


def metadata_errors(content: str, kind: str) -> list[str]:
    """What is wrong with the metadata of a card, in sentences; nothing where it is valid or absent."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = [f'"{name}" is no metadata of a {kind} card' for name in data if name not in KNOWN.get(kind, data)]
    licenses = data.get("license", "unknown")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES:
            errors.append(f'"license" is {name!r}, none of {sorted(LICENSES)}')
    if data.get("license_name") and data.get("license") != "other":
        errors.append('"license_name" goes with "license: other"')
    for name in ("tags", "datasets", "metrics"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{name}" must be a list of strings')
    for repo in data.get("datasets") or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
            errors.append(f'"datasets" holds {repo!r}, which is no data set of the Hub')
    for name in ("library_name", "pipeline_tag", "base_model"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    return errors + _model_index_errors(data.get("model-index", []))


def _model_index_errors(index: object) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for place, model in enumerate(index):
        where = f'"model-index[{place}]'
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'{where}.name" is required')
            continue
        results = model.get("results")
        if not isinstance(results, list) or not results:
            errors.append(f'{where}.results" must hold a result')
            continue
        for number, result in enumerate(results):
            at = f"{where}.results[{number}]"
            for part, names in (("task", ["type"]), ("dataset", ["type", "name"])):
                for name in names:
                    if not isinstance((result.get(part) or {}).get(name), str):
                        errors.append(f'{at}.{part}.{name}" is required')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'{at}.metrics" must hold a metric')
                continue
            for metric in metrics:
                if not isinstance(metric.get("type"), str):
                    errors.append(f'{at}.metrics.type" is required')
                if not isinstance(metric.get("value"), Number | str):
                    errors.append(f'{at}.metrics.value" is required')
    return errors
