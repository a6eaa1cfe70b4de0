#!/usr/bin/env python3
"""Builds the text corpus from Debian's own documentation packages.

Downloads the packages of scripts/corpus_packages.txt (apt-get download, no root, nothing is
installed), takes documents out of them, normalises, deduplicates, splits by document name and
writes into --out (default build/corpus):

  <split>.txt        the documents of train | validation | heldout one after the other, no separator
  <split>.index.tsv  one line a document: doc_id, domain, package, offset_bytes, length_bytes
                     (first line is that header; doc_id has no tabs; offsets into <split>.txt)
  manifest.json      packages with versions, sizes, sha256, what was dropped, the xz -9e baseline

Python 3.11 standard library only. The rules are described in model/corpus/README.md.
"""
import argparse
import collections
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
FORMAT = "v3bench-corpus-1"
SPLIT_SALT = "v3bench-split-1862"  # chosen by the sizes of the splits only (model/corpus/README.md)
HELDOUT, VALIDATION = 0.025, 0.015  # shares of documents
MIN_BYTES = 400
SHINGLE = 50            # bytes, from each word start, white space collapsed
MAX_OVERLAP = 0.30      # a held-out or validation document above this share is dropped
MAX_EVAL_BYTES = 300_000  # longer documents always go to train: one of them would be the held-out set
LONG_BYTES = 70_000     # surely more than 16K tokens of a 4096-piece vocabulary
SPLITS = ("train", "validation", "heldout")

# (package, regular expression on the path, domain, kind). The first group of the expression is the
# document's name. Kinds: text, info:<depth of the tree at which documents are cut>.
RULES = [(p, re.compile(r), d, k) for p, r, d, k in [
    ("python3.11-doc", r"usr/share/info/(python3\.11)\.info\.gz", "prose", "info:2"),
    ("perl-doc", r"usr/share/perl/[\d.]+/(?:pod/)?(?!perltoc)(.*\.pod)", "prose", "text"),
    ("perl-modules-5.36", r"usr/share/perl/[\d.]+/(.*\.pod)", "prose", "text"),
    ("perl-modules-5.36",
     r"usr/share/perl/[\d.]+/(?!unicore/|Unicode/Collate/|Module/CoreList)(.*\.p[lm])", "code", "text"),
    ("libpython3.11-minimal", r"usr/lib/python3\.11/(?!encodings/[cikmpht]|encodings/[^/]*\d)(.*\.py)",
     "code", "text"),
    ("libpython3.11-stdlib", r"usr/lib/python3\.11/(?!pydoc_data/)(.*\.py)", "code", "text"),
    ("python3-django", r"usr/lib/python3/dist-packages/(?!django/conf/locale)(.*\.py)", "code", "text"),
    ("vim-runtime", r"usr/share/vim/vim\d+/doc/(?!version\d|todo)(.*\.txt)", "prose", "text"),
    ("git-doc", r"usr/share/doc/git-doc/(?!RelNotes/)(.*\.txt)", "prose", "text"),
    ("cmake-data", r"usr/share/cmake-[\d.]+/Help/(.*\.rst)", "prose", "text"),
    ("debian-policy", r"usr/share/doc/debian-policy/policy\.html/_sources/(.*)\.txt", "prose", "text"),
    ("debian-policy", r"usr/share/doc/debian-policy/(?!policy\.txt|upgrading|README)(.*\.txt)\.gz",
     "prose", "text"),
    ("developers-reference", r"usr/share/developers-reference/_sources/(.*)\.txt", "prose", "text"),
    ("debian-reference-en", r"usr/share/debian-reference/(.*\.txt)\.gz", "prose", "text"),
    ("guile-3.0-doc", r"usr/share/info/guile-3\.0/(.*)\.info(?:-\d+)?\.gz", "prose", "info:2"),
    ("r-doc-info", r"usr/share/info/(.*)\.info(?:-\d+)?\.gz", "prose", "info:1"),
    ("bash-doc", r"usr/share/info/(.*)\.info(?:-\d+)?\.gz", "prose", "info:1"),
]]

# Chapters of an info tree whose children are documents of their own.
INFO_DEEPER = {"The Python Standard Library"}
INFO_SKIP = re.compile(r"\b(index|indices|Changelog|GNU Free Documentation License)\b", re.I)


def say(text):
    print(f"build_corpus: {text}", flush=True)


def fail(what, where, expected, found):
    sys.exit(f"build_corpus: {what}: {where}: expected {expected}, found {found}")


# ---- packages ------------------------------------------------------------------------------------

def package_names():
    path = os.path.join(HERE, "corpus_packages.txt")
    with open(path, encoding="ascii") as f:
        names = [line.split("#")[0].strip() for line in f]
    return [n for n in names if n]


def deb_of(debs, name):
    found = sorted(f for f in os.listdir(debs) if f.startswith(name + "_") and f.endswith(".deb"))
    return os.path.join(debs, found[-1]) if found else None


def fetch(debs, names):
    """Downloads what is missing in `debs`; apt keeps to the versions of its own package lists."""
    os.makedirs(debs, exist_ok=True)
    missing = [n for n in names if not deb_of(debs, n)]
    if not missing:
        return
    say(f"downloading {len(missing)} packages into {debs}")
    run = subprocess.run(["apt-get", "-q", "download", *missing], cwd=debs, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    still = [n for n in missing if not deb_of(debs, n)]
    if still:
        sys.stderr.write(run.stdout)
        fail("download failed", debs, "packages " + " ".join(missing),
             "nothing for " + " ".join(still) + " (apt-get update first? or give --debs DIR)")


def control_field(deb, field):
    return subprocess.run(["dpkg-deb", "-f", deb, field], check=True, text=True,
                          capture_output=True).stdout.strip()


def members(deb):
    """Yields (path without the leading ./, bytes), gunzipped where it ends in .gz."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as p:
        with tarfile.open(fileobj=p.stdout, mode="r|") as tar:
            for m in tar:
                if m.isfile():
                    path = m.name[2:] if m.name.startswith("./") else m.name
                    yield path, (lambda t=tar, x=m: t.extractfile(x).read())
        p.stdout.read()
    if p.returncode:
        fail("cannot unpack", deb, "a Debian package", f"dpkg-deb exit {p.returncode}")


# ---- text ----------------------------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
TRAILING = re.compile(r"[ \t]+$", re.M)
BLANKS = re.compile(r"\n{4,}")


def decode(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        head = data[:4000].lower()
        if b"iso-8859-1" in head or b"latin1" in head or b"latin-1" in head or b"iso8859-1" in head:
            return data.decode("iso-8859-1")
        return None


def normalise(text):
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = TRAILING.sub("", CONTROL.sub("", text))
    return BLANKS.sub("\n\n\n", text).strip("\n") + "\n"


def is_text(text):
    """Not a table of codes: mostly words, mostly ASCII, lines of a human length."""
    n = len(text)
    black = n - text.count(" ") - text.count("\n") - text.count("\t")
    letters = sum(map(text.count, "etaoinsrhl"))
    odd = len(text.encode()) - n
    longest = max(len(line) for line in text.split("\n"))
    return letters > 0.30 * black and odd < 0.10 * n and longest < 5000


NODE = re.compile(r"File: [^,\n]*,\s+Node: ([^\n]*?),?(?:,\s+Next: [^\n]*?)?(?:,\s+Prev: [^\n]*?)?"
                  r",\s+Up: ([^\n]*)\n")
SPHINX_NOTE = re.compile(r"\*note\s+([^:]{1,80}):\s+[0-9a-f]{1,5}\.")  # "*note json: a2." -> "json"
MENU = re.compile(r"^\* Menu:\n(?:\n|\* [^\n]*\n|[ \t]+[^\n]*\n|[^\n]{1,60}\n(?=\n+\* ))*", re.M)


def info_documents(name, text, depth):
    """Cuts an info file at nodes of the given depth in its tree: yields (document name, text)."""
    up, docs = {}, collections.OrderedDict()
    for chunk in text.split("\x1f")[1:]:
        chunk = chunk.lstrip("\n")
        m = NODE.match(chunk)
        if not m:
            continue  # tag table, indirect table
        node, parent = m.group(1).strip(), m.group(2).strip()
        up[node] = parent
        if node == "Top":
            continue
        path = [node]
        while up.get(path[-1]) not in (None, "Top", "(dir)") and len(path) < 20:
            path.append(up[path[-1]])
        path.reverse()
        cut = depth + 1 if INFO_DEEPER.intersection(path[:2]) else depth
        key = "/".join(p.replace("/", "_").replace("\t", " ") for p in path[:cut])
        if INFO_SKIP.search(path[0]) or INFO_SKIP.search(key):
            continue
        docs.setdefault(key, []).append(SPHINX_NOTE.sub(r"\1", MENU.sub("", chunk[m.end():])).strip("\n"))
    for key, parts in docs.items():
        yield f"{name}/{key}", "\n\n".join(parts) + "\n"


Document = collections.namedtuple("Document", "id domain package text")


def extract(debs, names, dropped):
    docs, packages = [], []
    for package in names:
        deb = deb_of(debs, package)
        rules = [r for r in RULES if r[0] == package]
        with open(deb, "rb") as f:
            sha = hashlib.sha256(f.read()).hexdigest()
        packages.append({"package": package, "version": control_field(deb, "Version"),
                         "architecture": control_field(deb, "Architecture"),
                         "deb_bytes": os.path.getsize(deb), "deb_sha256": sha})
        texts, infos = [], collections.defaultdict(dict)
        for path, read in members(deb):
            for _, expression, domain, kind in rules:
                m = expression.fullmatch(path)
                if not m:
                    continue
                data = read()
                if path.endswith(".gz"):
                    data = gzip.decompress(data)
                text = decode(data)
                if text is None:
                    dropped["not_utf8"].append(f"{package}/{m.group(1)}")
                elif kind == "text":
                    texts.append((m.group(1), domain, text))
                else:
                    part = re.search(r"\.info-(\d+)", path)
                    infos[(m.group(1), domain, int(kind[5:]))][int(part[1]) if part else 0] = text
                break
        for (name, domain, depth), parts in infos.items():
            joined = "".join(parts[k] for k in sorted(parts))
            texts += [(n, domain, t) for n, t in info_documents(name, joined, depth)]
        for name, domain, text in sorted(texts):
            text = normalise(text)
            doc = Document(f"{package}/{name}", domain, package, text)
            if len(text.encode()) < MIN_BYTES:
                dropped["too_short"].append(doc.id)
            elif not is_text(text):
                dropped["not_text"].append(doc.id)
            else:
                docs.append(doc)
        if not any(d.package == package for d in docs):
            fail("no documents", deb, "files matching its rules", "none")
    return docs, packages


# ---- split ---------------------------------------------------------------------------------------

def split_of(doc_id, length_bytes):
    """By a hash of the name alone; only giants are kept out of the small splits."""
    if length_bytes > MAX_EVAL_BYTES:
        return "train"
    h = hashlib.sha256(f"{SPLIT_SALT}:{doc_id}".encode()).digest()
    u = int.from_bytes(h[:8], "big") / 2.0**64
    return "heldout" if u < HELDOUT else "validation" if u < HELDOUT + VALIDATION else "train"


def deduplicate(docs, dropped):
    """Keeps the first of documents whose text is the same but for white space."""
    seen, kept = set(), []
    for d in docs:
        key = hashlib.sha256(" ".join(d.text.split()).encode()).digest()
        if key in seen:
            dropped["duplicate"].append(d.id)
        else:
            seen.add(key)
            kept.append(d)
    return kept


WORD_START = re.compile(rb"(?<![A-Za-z0-9_])[A-Za-z0-9_]")


def shingles(text):
    flat = b" ".join(text.encode().split())
    return [flat[m.start():m.start() + SHINGLE] for m in WORD_START.finditer(flat)
            if m.start() + SHINGLE <= len(flat)]


def lines_of(text):
    return [s for s in (" ".join(line.split()) for line in text.split("\n")) if len(s) >= SHINGLE]


def check_leaks(splits, dropped):
    """Share of each held-out/validation document's shingles found verbatim in train; drops the worst."""
    probe = [(s, d, shingles(d.text), lines_of(d.text)) for s in SPLITS[1:] for d in splits[s]]
    wanted = set().union(*(p[2] for p in probe))
    wanted_lines = set().union(*(p[3] for p in probe))
    hit, hit_lines = set(), set()
    for d in splits["train"]:
        hit.update(wanted.intersection(shingles(d.text)))
        hit_lines.update(wanted_lines.intersection(lines_of(d.text)))
    overlap, total = {}, {s: [0, 0, 0, 0] for s in SPLITS[1:]}
    for split, d, grams, lines in probe:
        a, b = sum(g in hit for g in grams), sum(x in hit_lines for x in lines)
        share = max(a / max(1, len(grams)), b / max(1, len(lines)))
        if share > MAX_OVERLAP:
            splits[split].remove(d)
            dropped["overlap"].append(f"{d.id} ({split}, {share:.2f})")
            continue
        overlap[d.id] = round(a / max(1, len(grams)), 4)
        total[split] = [x + y for x, y in zip(total[split], (a, len(grams), b, len(lines)))]
    summary = {s: {"shingle_share": round(t[0] / max(1, t[1]), 4), "line_share": round(t[2] / max(1, t[3]), 4)}
               for s, t in total.items()}
    return overlap, summary


# ---- output --------------------------------------------------------------------------------------

def write_atomic(path, data):
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)


def write_split(out, split, docs):
    body, index = io.BytesIO(), ["doc_id\tdomain\tpackage\toffset_bytes\tlength_bytes\n"]
    for d in docs:
        data = d.text.encode()
        index.append(f"{d.id}\t{d.domain}\t{d.package}\t{body.tell()}\t{len(data)}\n")
        body.write(data)
    data, table = body.getvalue(), "".join(index).encode()
    write_atomic(os.path.join(out, f"{split}.txt"), data)
    write_atomic(os.path.join(out, f"{split}.index.tsv"), table)
    by_domain = {dom: {"documents": sum(d.domain == dom for d in docs),
                       "bytes": sum(len(d.text.encode()) for d in docs if d.domain == dom),
                       "long_documents": sum(len(d.text.encode()) > LONG_BYTES for d in docs if d.domain == dom)}
                 for dom in ("prose", "code")}
    return data, {"documents": len(docs), "bytes": len(data), "domains": by_domain,
                  "txt_sha256": hashlib.sha256(data).hexdigest(),
                  "index_sha256": hashlib.sha256(table).hexdigest()}


def xz_bytes(data):
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def xz_baseline(docs):
    """xz -9e in bits a byte: of the whole, of each domain, and of each document alone."""
    def bpb(group):
        data = b"".join(d.text.encode() for d in group)
        return {"bytes": len(data), "xz_bytes": xz_bytes(data),
                "bits_per_byte": round(8 * xz_bytes(data) / max(1, len(data)), 4)}
    alone = {d.id: bpb([d]) for d in docs}
    n, x = (sum(a[k] for a in alone.values()) for k in ("bytes", "xz_bytes"))
    return {"concatenated": bpb(docs),
            "prose": bpb([d for d in docs if d.domain == "prose"]),
            "code": bpb([d for d in docs if d.domain == "code"]),
            "documents_alone": {"bytes": n, "xz_bytes": x, "bits_per_byte": round(8 * x / max(1, n), 4)},
            "per_document": alone}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=os.path.join(HERE, "..", "build", "corpus"))
    parser.add_argument("--debs", help="folder of the .deb files (default OUT/debs); missing ones are downloaded")
    parser.add_argument("--fetch-only", action="store_true", help="download the packages and stop")
    args = parser.parse_args()
    begin = time.time()
    out = os.path.abspath(args.out)
    debs = os.path.abspath(args.debs) if args.debs else os.path.join(out, "debs")
    names = package_names()
    fetch(debs, names)
    if args.fetch_only:
        return
    os.makedirs(out, exist_ok=True)
    dropped = collections.defaultdict(list)
    docs, packages = extract(debs, names, dropped)
    docs = deduplicate(docs, dropped)
    say(f"{len(docs)} documents, {sum(len(d.text.encode()) for d in docs) / 1e6:.1f} MB, "
        f"{time.time() - begin:.0f} s")
    splits = {s: [d for d in docs if split_of(d.id, len(d.text.encode())) == s] for s in SPLITS}
    overlap, leak = check_leaks(splits, dropped)
    manifest = {"format": FORMAT, "split_salt": SPLIT_SALT, "packages": packages, "splits": {}}
    for s in SPLITS:
        _, manifest["splits"][s] = write_split(out, s, splits[s])
    held = manifest["splits"]["heldout"]["domains"]
    for domain in held:
        if held[domain]["long_documents"] < 2:
            fail("held-out split", domain, f"at least 2 documents over {LONG_BYTES} bytes",
                 held[domain]["long_documents"])
    manifest["leak_check"] = {"shingle_bytes": SHINGLE, "max_overlap": MAX_OVERLAP, **leak,
                              "heldout_documents": {d.id: overlap[d.id] for d in splits["heldout"]}}
    manifest["xz_9e"] = {s: xz_baseline(splits[s]) for s in ("heldout", "validation")}
    del manifest["xz_9e"]["validation"]["per_document"]
    manifest["dropped"] = {k: {"count": len(v), **({} if k == "too_short" else {"documents": v})}
                           for k, v in sorted(dropped.items())}
    write_atomic(os.path.join(out, "manifest.json"),
                 (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    for s in SPLITS:
        m = manifest["splits"][s]
        parts = ", ".join(f"{k} {v['bytes'] / 1e6:.2f} MB in {v['documents']} ({v['long_documents']} long)"
                          for k, v in m["domains"].items())
        say(f"{s:10s} {m['bytes'] / 1e6:7.2f} MB, {m['documents']:5d} documents: {parts}")
    x = manifest["xz_9e"]["heldout"]
    say("xz -9e on held-out, bits per byte: " + ", ".join(
        f"{k} {x[k]['bits_per_byte']:.4f}" for k in ("concatenated", "prose", "code", "documents_alone")))
    say(f"held-out found in train: {leak['heldout']['shingle_share']:.2%} of {SHINGLE}-byte shingles, "
        f"{leak['heldout']['line_share']:.2%} of long lines; dropped " +
        ", ".join(f"{len(v)} {k}" for k, v in sorted(dropped.items())))
    say(f"wrote {out} in {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
