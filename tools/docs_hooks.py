"""MkDocs hooks: README and CONTRIBUTING are pages of the site; links to files outside of docs/ become plain text."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=site_links((ROOT / source).read_text())))
    return files


def on_page_markdown(markdown, page, config, files):
    """`[recipe](../recipes/x.yaml)` -> `recipe`: the site holds no copy of the repository."""
    for path in re.findall(r"\]\(\.\./([^)#]+)", markdown):
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to ../{path}, which is not there")
    return re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def site_links(text):
    """Links of a page of the repository's root, as links of a page of docs/."""
    pages = {source: page for page, source in PAGES.items()}
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({pages.get(m[1]) or from_docs(m[1])})", text)


def from_docs(path):
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
