"""HTML documentation as plain text: headings, paragraphs, lists and code, without navigation. Used by nano_text.py."""
import html.parser
import re

BLOCKS = {"p", "div", "section", "article", "table", "tr", "ul", "ol", "dl", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "pre",
          "blockquote", "hr"}
DROPPED = {"script", "style", "nav", "header", "footer", "head", "form", "button", "svg", "noscript"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"}
ASIDE = re.compile(r"(?<!with)sidebar|navheader|navfooter|related|breadcrumb|footer|headerlink|toctree|menu|langs")
WHOLE = {"html", "body", "main"}


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.pre, self.dropped = [], 0, []

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.parts.append("\n")
        if tag in VOID:
            return
        names = " ".join(str(value) for key, value in attributes if key in ("class", "id", "role"))
        if self.dropped or tag in DROPPED or (tag not in WHOLE and ASIDE.search(names)):
            self.dropped.append(tag)
        elif tag == "pre":
            self.pre += 1
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3", "table", "dl") else "\n")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag in ("td", "th"):
            self.parts.append("  ")

    def handle_endtag(self, tag):
        if self.dropped:
            while tag in self.dropped and self.dropped.pop() != tag:
                pass
        elif tag == "pre":
            self.pre = max(0, self.pre - 1)
            self.parts.append("\n\n")
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.dropped:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def to_text(source):
    reader = Reader()
    reader.feed(source)
    lines = [line.rstrip().replace("¶", "") for line in "".join(reader.parts).splitlines()]
    lines = [line[1:] if re.match(r" \S", line) else line for line in lines]
    text = re.sub(r"(?m)^-\s*\n\s*", "- ", "\n".join(lines))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
