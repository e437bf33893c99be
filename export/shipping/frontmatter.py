"""The head of a model card: the YAML between two lines of dashes that the Hugging Face Hub reads.

The Hub refuses a card with a value that it does not know, so only what it takes is written; the card's text
says the rest. Source: https://huggingface.co/docs/hub/model-cards and its list of licences.
"""

from __future__ import annotations

import re
from typing import Any

from export.about import About

TAGS = ("gguf", "samovar")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_NO_LICENCE_NAME = re.compile(r"[^a-z0-9.-]+")
# What the Hub takes as `license`; anything else is `other`, with a name and a link beside it.
LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1
    lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl
    odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)


def head(about: About) -> list[str]:
    """The lines between --- and ---. What the Hub would refuse there is left to the card's text."""
    import yaml

    names = [name for name in about.base_models if _REPOSITORY.fullmatch(name)]
    data = [name for name in about.datasets if _REPOSITORY.fullmatch(name)]
    languages = [code for code in about.languages if _LANGUAGE.fullmatch(code)]
    values: dict[str, Any] = {**_licence_keys(about)}
    values |= {"language": languages} if languages else {}
    values |= {"base_model": names} if names else {}
    values |= {"datasets": data} if data else {}
    values["pipeline_tag"] = "text-generation"
    values["tags"] = list(dict.fromkeys([*TAGS, *(tag for tag in about.tags if tag != "text-generation")]))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False, width=2**16)
    return ["---", *text.splitlines(), "---", ""]


def _licence_keys(about: About) -> dict[str, str]:
    """license, and its name and link where the Hub has no word for it."""
    known = about.license.lower()
    if not known:
        return {}
    link = {"license_link": about.license_link} if about.license_link else {}
    if known in LICENCES and known != "other":
        return {"license": known} | link
    name = _NO_LICENCE_NAME.sub("-", (about.license_name or known).lower()).strip("-")
    return {"license": "other", "license_name": name or "other"} | (
        link or {"license_link": "LICENSES/README.txt"}
    )
