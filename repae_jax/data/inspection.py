"""What is wrong with a set of image files, before training on it: every image is read as training would read it."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from repae_jax import faults
from repae_jax.data import decoding, reading
from repae_jax.data.source import EncodedImages
from repae_jax.images import center_crop
from repae_jax.ranges import height_width, in_words

SHOWN = 5  # names in a sentence
BLOCK = 64  # images at a time
NARROW = 2.0  # of the ratios of the sides, theirs and training's, above which less than half of the picture is seen
IMBALANCE = 10  # images of the largest class over those of the smallest
FEW = 20  # images of a class
NEAR = 3  # bits of 64 in which outlines of nearly the same pictures differ at most
MOST_COMPARED = 20_000  # images, each with each
BLANK = 2.0  # standard deviation of the pixels' brightness, 0..255
_AN_OBJECT = re.compile(r" <_io\.BytesIO[^>]*>")  # in the place of a file's name, which Pillow is not told
_ORIENTATION = 0x0112  # EXIF: how the picture is to be turned


@dataclasses.dataclass(frozen=True)
class Look:
    """Describes one image file; with `error`, it cannot be decoded, and all else is unknown."""

    error: str = ""
    size: int = 0  # bytes
    kind: str = ""  # as Pillow calls it
    mode: str = ""  # of the pixels, as Pillow calls it
    width: int = 0
    height: int = 0
    pixels: str = ""  # hash of the part that training sees
    outline: int = 0  # 64 bits, the same for pictures that look the same
    is_blank: bool = False
    is_turned: bool = False  # by its EXIF, which training does not heed
    has_alpha: bool = False


def look(source: EncodedImages, i: int) -> Look:
    """Returns what record `i` is like; OSError, naming it, if the system fails."""
    content = b""
    try:
        content = faults.read(source.content, i, name=lambda: source.name(i))
        with decoding.open_image(content) as image:
            kind, mode, (width, height) = image.format, image.mode, image.size
            is_turned = image.getexif().get(_ORIENTATION, 1) != 1
            seen, has_alpha = center_crop(image, source.image_size), _is_transparent(image)
    except Exception as error:  # Pillow raises nearly anything
        if faults.is_of_the_system(error):
            raise
        return Look(error=_AN_OBJECT.sub("", reading.describe_error(error)), size=len(content))
    gray = Image.fromarray(seen).convert("L")
    return Look(
        size=len(content), kind=kind or "", mode=mode, width=width, height=height, is_turned=is_turned, has_alpha=has_alpha,
        pixels=hashlib.sha256(seen.tobytes()).hexdigest()[:16], outline=outline(gray),
        is_blank=bool(np.asarray(gray, np.float32).std() < BLANK),
    )  # fmt: skip


def _is_transparent(image):
    """Returns whether some of a decoded image's pixels are, or a color of its palette."""
    if "A" in image.getbands():
        return image.getchannel("A").getextrema()[0] < 255
    return "transparency" in image.info


def outline(gray: Image.Image) -> int:
    """Returns 64 bits: whether each of 8 x 8 positions is brighter than its left neighbor; small changes rarely matter.

    Reference: the difference hash, dHash, of N. Krawetz, "Kind of Like That", 2013.
    """
    small = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), np.int16)
    return int("".join("1" if bit else "0" for bit in (small[:, 1:] > small[:, :-1]).ravel()), 2)


def near(outlines: Sequence[int], contents: Sequence[str]) -> list[int]:
    """Returns the indices of pictures whose outline differs in NEAR bits or fewer from another one's with other content.

    Those that are near each other follow one another. It takes little memory, however many there are.
    """
    bits, kinds = np.array(outlines, np.uint64), np.unique(list(contents), return_inverse=True)[1]
    found, is_found = [], np.zeros(len(bits), bool)
    for i in range(len(bits)):
        is_near = (np.bitwise_count(bits[i + 1 :] ^ bits[i]) <= NEAR) & (kinds[i + 1 :] != kinds[i])
        if is_near.any():
            group = np.concatenate([[i], i + 1 + np.flatnonzero(is_near)])
            found += group[~is_found[group]].tolist()
            is_found[group] = True
    return found


def look_at_all(source: EncodedImages) -> Iterator[Look]:
    """Yields what each record is like, in order; several are read at a time."""
    for first, end in reading.cut(0, len(source), BLOCK):
        yield from reading.at_once(lambda i: look(source, i), range(first, end))


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may be."""

    is_problem: bool  # True if training would end
    title: str  # of a row of pictures
    text: str  # a sentence
    records: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A source, what its images are like, and its classes' names."""

    source: EncodedImages
    looks: Sequence[Look]
    class_names: Mapping[int, str]

    def decoded(self) -> list[int]:
        """Returns the records that can be decoded."""
        return [i for i, seen in enumerate(self.looks) if not seen.error]

    def class_counts(self) -> dict[int, int]:
        """Returns how many images each class has, the largest first; classes of a labels file may have none."""
        counts = np.bincount(self.source.labels, minlength=self.source.num_classes)
        return {int(label): int(counts[label]) for label in np.argsort(-counts, kind="stable")}

    def groups(self, key: Callable[[Look], object]) -> list[list[int]]:
        """Returns the groups of two or more decoded records that have the same key."""
        found = collections.defaultdict(list)
        for i in self.decoded():
            found[key(self.looks[i])].append(i)
        return [records for records in found.values() if len(records) > 1]

    def names(self, records: Sequence[int]) -> str:
        """Returns the first few names of records, for a sentence."""
        shown = ", ".join(self.source.name(i) for i in records[:SHOWN])
        return f"{shown}{', …' if len(records) > SHOWN else ''}"

    def findings(self, max_bad_fraction: float) -> list[Finding]:
        """Returns everything that is wrong or may be, what ends training first."""
        found = [*self._undecodable(max_bad_fraction), *self._duplicates(), *self._shapes(), *self._content(), *self._classes()]
        return sorted(found, key=lambda finding: not finding.is_problem)

    def _undecodable(self, max_bad_fraction):
        bad = [i for i, seen in enumerate(self.looks) if seen.error]
        if not bad:
            return
        allowed = int(max_bad_fraction * len(self.looks))
        reasons = ", ".join(f"{self.source.name(i)} ({self.looks[i].error})" for i in bad[:SHOWN])
        count, reasons = f"{len(bad)} of {len(self.looks)} images", f"{reasons}{', …' if len(bad) > SHOWN else ''}"
        text = f"{count} cannot be decoded, max_bad_fraction={max_bad_fraction:g} allows {allowed}: {reasons}"
        yield Finding(len(bad) > allowed, "", f"{text}; repair or remove them", bad)

    def _duplicates(self):
        equal = self.groups(lambda seen: seen.pixels)
        flat = [i for group in equal for i in group]
        if equal:
            text = f"{len(flat) - len(equal)} images repeat others, pixel by pixel: {self.names(flat)}; keep one of each"
            yield Finding(False, "Equal pictures", text, flat)
        labels = self.source.labels
        torn = [group for group in equal if len({int(labels[i]) for i in group}) > 1]
        if flat := [i for group in torn for i in group]:
            text = f"{len(torn)} pictures are in several classes: {self.names(flat)}; a class cannot be learned from them"
            yield Finding(False, "In several classes", text, flat)
        shown = [i for i in self.decoded() if not self.looks[i].is_blank]
        if len(shown) > MOST_COMPARED:
            yield Finding(False, "", f"images that look nearly the same are not sought among more than {MOST_COMPARED}")
        elif found := near([self.looks[i].outline for i in shown], [self.looks[i].pixels for i in shown]):
            flat = [shown[at] for at in found]
            text = f"{len(flat)} images look nearly the same as others: {self.names(flat)}"
            yield Finding(False, "Nearly the same", text, flat)

    def _shapes(self):
        (height, width), looks = height_width(self.source.image_size), self.looks
        shares = {i: min(looks[i].width / width, looks[i].height / height) for i in self.decoded()}
        if small := sorted((i for i, share in shares.items() if share < 1), key=shares.__getitem__):
            least, size = looks[small[0]], in_words(self.source.image_size)
            text = f"{len(small)} images are smaller than {size} pixels (the smallest {least.width} x {least.height})"
            yield Finding(False, "Enlarged", f"{text}, and enlarged, so blurred: {self.names(small)}; lower image_size?", small)
        relative = {i: (looks[i].width * height, looks[i].height * width) for i in shares}
        if narrow := [i for i, sides in relative.items() if max(sides) > NARROW * min(sides)]:
            than = "as long as wide" if width == height else f"as long or as wide as {height} x {width} pixels"
            text = f"{len(narrow)} images are more than {NARROW:g} times {than}, and training sees their middle alone"
            yield Finding(False, "Long and narrow", f"{text}: {self.names(narrow)}", narrow)
        if turned := [i for i in shares if looks[i].is_turned]:
            text = f"{len(turned)} images are turned by their EXIF data, which training does not heed: {self.names(turned)}"
            yield Finding(False, "Lying or upside down", f"{text}; turn the pixels, as `mogrify -auto-orient` does", turned)

    def _content(self):
        decoded = self.decoded()
        if blank := [i for i in decoded if self.looks[i].is_blank]:
            yield Finding(False, "Blank", f"{len(blank)} images show one color, or hardly more: {self.names(blank)}", blank)
        if alpha := [i for i in decoded if self.looks[i].has_alpha]:
            text = f"{len(alpha)} images have transparent parts, of which training sees the color beneath: {self.names(alpha)}"
            yield Finding(False, "Transparent", f"{text}; put them on a background", alpha)

    def _classes(self):
        counts = self.class_counts()
        largest, smallest = next(iter(counts)), list(counts)[-1]
        if empty := [label for label, count in counts.items() if not count]:
            yield Finding(False, "", f"{len(empty)} labels have no images: {', '.join(map(str, sorted(empty)[:SHOWN]))}, …")
        elif counts[largest] > IMBALANCE * counts[smallest]:
            sizes = " and ".join(f"{self.class_names[label]} {counts[label]}" for label in (largest, smallest))
            yield Finding(False, "", f"the classes are of very different sizes: {sizes} images; small ones are learned late")
        if few := [label for label, count in counts.items() if 0 < count < FEW]:
            names = ", ".join(f"{self.class_names[label]} {counts[label]}" for label in few[:SHOWN])
            text = f"{len(few)} classes have fewer than {FEW} images ({names}), which samples may repeat"
            yield Finding(False, "", text)
