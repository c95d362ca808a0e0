"""What the site has beside docs/: pages of the repository's root, and files that pages link to.

The pages link to `../NAME`, which is right on a code host. In the site, CONTRIBUTING.md and CHANGELOG.md are pages,
the front page takes the README's place, and other files are copied. A link that is named as a page gets its title.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FRONT = "index.md"
_NAMED_AS_FILE = re.compile(r"\[(?:docs/)?([\w-]+\.md)\](?=\()")
_OPTION = re.compile(r"<code>(--[\w-]+(?: [^\s<]{1,20})?)</code>")
_COMMANDS = re.compile(
    r'<div class="language-bash highlight">.*?</div>', flags=re.DOTALL
)
_ARGUMENTS = re.compile(
    r"<table>(?=\s*<thead>\s*<tr>\s*<th>argument</th>\s*<th>default</th>)"
)
_WORD = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_LINK = re.compile(r"(\]\()(\.\./)?([\w./-]+)([)#])")


def on_files(files, config):
    for source, page in _PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(
            File.generated(config, page, content=_LINK.sub(_from_the_root, text))
        )
    for path in sorted((ROOT / "docs").glob("*.md")):
        for match in _LINK.finditer(path.read_text(encoding="utf-8")):
            if (
                match[2]
                and match[3] not in {*_PAGES, "README.md"}
                and files.get_file_from_path(match[3]) is None
            ):
                files.append(
                    File.generated(config, match[3], abs_src_path=str(ROOT / match[3]))
                )
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = _NAMED_AS_FILE.sub(_titled, markdown)
    return _LINK.sub(_from_docs, markdown) if "/" not in page.file.src_uri else markdown


def on_page_content(html, page, config, files):
    html = _COMMANDS.sub(_whole_options, html)
    html = _ARGUMENTS.sub("<table data-arguments>", html)
    return _OPTION.sub(r'<code class="option">\1</code>', html)


def _whole_options(block: re.Match) -> str:
    """Options of a command do not break after their hyphens where the line wraps."""
    return _WORD.sub(lambda word: f'<span class="option">{word[0]}</span>', block[0])


def _titled(match: re.Match) -> str:
    path = ROOT / "docs" / match[1]
    if not path.is_file():
        return match[0]
    title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return f"[{title}]"


def _from_docs(match: re.Match) -> str:
    """A link of a page in docs/, where `../` is the repository's root."""
    if match[2] is None:
        return match[0]
    target = _FRONT if match[3] == "README.md" else _PAGES.get(match[3], match[3])
    return f"{match[1]}{target}{match[4]}"


def _from_the_root(match: re.Match) -> str:
    """A link of a page in the root: what is in docs/ is beside it in the site."""
    target = match[3].removeprefix("docs/")
    return f"{match[1]}{_FRONT if target == 'README.md' else _PAGES.get(target, target)}{match[4]}"
