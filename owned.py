"""The rule about files, for every program here:

Only what we made and marked is ever deleted, moved or overwritten. Links are not followed. What is refused is named
in one line, and the program ends with exit code 2.

made       A folder of ours holds .made_by_mhc, which says what it is: a run, a corpus, results, a drill ....
           What is ours in it are the names of NAMES below. A single file (exported weights, a picture) carries a mark
           inside, by which it is known again.
strangers  A name that is not ours stays, in a folder of ours too; what would take it along is refused. (Only a run that
           --init_from=scratch moves aside is moved with all that lies in it, and says where to.)
before     What was made before there were marks is known by its content: good enough to be read and gone on with.
links      A path that is given may lead through links. The last name of it, which would be deleted, moved or
           overwritten, may not be one; nor a folder, a FIFO, a device.
refused    Also: a target inside a checkpoint, and a folder of ours of another kind. It raises NotOurs, before anything
           is changed.
whole      A file gets its name once it is complete and on the disk. Until then it has no name at all where the system
           can do that (O_TMPFILE), so a kill leaves nothing; elsewhere a kill leaves .made_by_mhc.<name>, which the
           next write of that file clears away.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys

from program import naming
from records import RecordError, kind_of_file, names_in, one_of, read_json

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

MARK = ".made_by_mhc"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag
SHARD = r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors"
STEP = rf"({SHARD}|state\.json|manifest\.json)"
CORPUS = rf"((train|val)_\d{{6,}}\.bin|meta\.json|tokenizer\.json|journal\.json|{re.escape(MARK)})"
RUN = (
    r"(config\.json|settings\.py|metrics\.jsonl|metrics-dropped\.jsonl|maps\.npz|trace\.json|log\.txt|latest|\.lock|"
    r"made-by-experiments\.json|"
    rf"(\.tmp-|\.tmp-old-|broken-)?step-\d{{8,}}(-\d+)?(/{STEP})?|{re.escape(MARK)})"
)
NAMES = {  # what it is: what its own names look like, as paths within the folder
    "step": STEP,
    "run": RUN,
    "corpus": CORPUS,
    "huggingface": r"(config\.json|model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json|"
    rf"tokenizer(_config)?\.json|{re.escape(MARK)})",
    "results": rf"(results\.json|lm_eval\.json|score_vs_step\.png|{re.escape(MARK)})",
    "drill": rf"((dis|undis)turbed(\.log|/{RUN}|/(broken-)?step-\d{{8,}}(-\d+)?/\.DS_Store)?|"
    rf"data(\.tmp|\.old)?(/{CORPUS})?|text(/[ab]\.txt)?|kept(/{STEP})?|{re.escape(MARK)})",
}


class NotOurs(Exception):
    """Something is in the way that is not ours to delete, move or overwrite; the message is one line that names it."""

    code = 2  # of the program that ends with it


def refuse(message):
    """End the program as the rule wants it."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# -- folders ----------------------------------------------------------------------------------------------------------


def is_folder(path):
    """Whether it is a folder itself, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def what_is(folder):
    """What our mark says that a folder is, or None if it bears none."""
    mark = os.path.join(folder, MARK)
    try:
        if not stat.S_ISREG(os.lstat(mark).st_mode):
            return None
        return read_json(mark, {"made_by": one_of("mhc"), "what": one_of(*NAMES)}, limit=4096)["what"]
    except (OSError, RecordError):
        return None


def is_name(what, path):
    """Whether this path within a folder is one of ours, or leads to one. what: of NAMES, or a set of such paths."""
    if isinstance(what, frozenset):
        return path in what
    folder, slash, name = path.rpartition("/")
    path = folder + slash + name.removeprefix(f"{MARK}.")  # what a killed write has left
    return re.fullmatch(NAMES[what], path) is not None


def check_place(path):
    """Raise NotOurs for a path inside a checkpoint: what is written there would damage it, or be removed with it."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    while folder != (above := os.path.dirname(folder)):
        if re.fullmatch(r"step-\d{8,}", os.path.basename(folder)) and os.path.lexists(f"{folder}/manifest.json"):
            raise NotOurs(f"{path}: lies inside the checkpoint {folder}, which nothing may be written into")
        folder = above


def make(folder, what, recognise=lambda folder: False):
    """A folder of ours to write in, made if it is not there, with our mark.

    An unmarked one is taken if it holds none of the names that we would write, or if recognise(folder) knows it for
    ours. Raises NotOurs, and OSError if it cannot be made."""
    check_place(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotOurs(f"{folder}: wanted a folder, there is {kind_of_file(os.lstat(folder).st_mode)}")
    os.makedirs(folder, exist_ok=True)
    found = what_is(folder)
    if found not in (None, what):
        raise NotOurs(f"{folder}: holds a {found}, not a {what}; choose another folder")
    if found is None:
        theirs = [name for name in names_in(folder) if is_name(what, name)]
        if theirs and not recognise(folder):
            raise NotOurs(
                f"{folder}: holds {theirs[0]}, which is not known to be ours; move it away, or choose another folder"
            )
        write_json(os.path.join(folder, MARK), {"made_by": "mhc", "what": what})


def strangers(folder, what):
    """Paths within a folder that are not ours: other names, and our names on what we never make, such as links."""
    return [name for name in all_paths(folder) if not is_ours(os.path.join(folder, name), what, name)]


def all_paths(folder):
    """Paths of everything below a folder, folders too, links not followed."""
    for name in names_in(folder):
        yield name
        if is_folder(os.path.join(folder, name)):
            yield from (f"{name}/{inner}" for inner in all_paths(os.path.join(folder, name)))


def is_ours(path, what, name):
    """Whether what stands at a path, which is `name` within a folder of ours, is of a kind that we make there."""
    mode = os.lstat(path).st_mode
    a_link = name.rpartition("/")[2] == "latest" and stat.S_ISLNK(mode)
    return is_name(what, name) and (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or a_link)


def check_removable(folder, what, recognise=lambda folder: False):
    """Raise NotOurs unless all of a folder is ours, and remove() would leave nothing of it. An empty one will do."""
    if not os.path.lexists(folder):
        return
    if not is_folder(folder):
        raise NotOurs(f"{folder}: is {kind_of_file(os.lstat(folder).st_mode)}, not a folder of ours; move it away")
    if not names_in(folder):
        return
    if what_is(folder) != what and not recognise(folder):
        raise NotOurs(f"{folder}: is there and not known to be a {what} of ours; move it away, or choose another name")
    if others := strangers(folder, what):
        raise NotOurs(f"{folder}: holds {others[0]}, which is not ours; move it away, or choose another folder")


def remove(folder, what, last=MARK):
    """Remove all that is ours in a folder that is ours, and the folder, unless strangers' files are left in it: their
    paths. `last`: the name by which the rest is known for ours, removed after it."""
    if not os.path.lexists(folder):
        return []
    if not is_folder(folder):
        raise NotOurs(f"{folder}: is {kind_of_file(os.lstat(folder).st_mode)}, not a folder of ours; move it away")
    names = [n for n in all_paths(folder) if is_ours(os.path.join(folder, n), what, n)]
    for name in sorted(names, key=lambda n: (n == last, -n.count("/"), n)):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            if not is_folder(path):
                os.remove(path)
    for name in sorted(names, key=lambda n: -n.count("/")):
        if is_folder(os.path.join(folder, name)):
            remove_if_empty(os.path.join(folder, name))
    remove_if_empty(folder)
    return list(all_paths(folder)) if is_folder(folder) else []


def remove_if_empty(folder):
    try:
        os.rmdir(folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def free_name(path):
    """path, or path-2, path-3 ...: the first that is not there."""
    k, name = 1, path
    while os.path.lexists(name):
        k += 1
        name = f"{path}-{k}"
    return name


# -- files ------------------------------------------------------------------------------------------------------------


def check_file(path, ours=None):
    """Raise NotOurs if what stands at `path` may not be overwritten.

    ours(path) knows a file of ours again; None: its name alone tells, as in a folder of ours."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise NotOurs(f"{path}: is {kind_of_file(mode)}, and no file that could be replaced; choose another name")
    if ours is not None and not ours(path):
        raise NotOurs(
            f"{path}: is there and was not made by this program, or altered since; move it away, or choose another name"
        )


@contextlib.contextmanager
def whole_file(path, ours=None, binary=False):
    """A file to write, which gets its name once it is complete and durable; else nothing is left of it.

    Raises NotOurs before anything is written, see check_file; an OSError names the file."""
    check_file(path, ours)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"{MARK}.{name}"[:255])
    with naming(path):
        fd, named = open_nameless(folder or ".", temporary)
        try:
            with os.fdopen(fd, "w+b") if binary else os.fdopen(fd, "w", encoding="utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
                named = named or give_name(f.fileno(), path, temporary)
            if named == temporary:
                check_file(path, ours)  # it took a while: somebody may have come in between
                os.replace(temporary, path)
        except BaseException:
            if named == temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(temporary)
            raise


def open_nameless(folder, temporary):
    """A new file without a name -> its descriptor, None; where the system has no such thing: one named `temporary`."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), None
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    return open_named(temporary), temporary


def open_named(temporary):
    """The descriptor of a new file of this name, locked; a killed process' leftover, which is not, goes first."""
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
            lock(fd)
            return fd
        remove_leftover(temporary)
    raise OSError(errno.EBUSY, "another process is writing this file", temporary)


def remove_leftover(temporary):
    """Remove what a killed write has left; what somebody is writing stays."""
    with contextlib.suppress(FileNotFoundError):
        check_file(temporary)
        fd = os.open(temporary, os.O_RDWR | NO_LINK)
        try:
            if lock(fd):
                os.remove(temporary)
        finally:
            os.close(fd)


def lock(fd):
    """Lock an open file for as long as this process has it open; False if another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def give_name(fd, path, temporary):
    """Give a nameless file the name `path`, or, where that is taken, `temporary`. -> the name."""
    here = os.open("/proc/self/fd", os.O_RDONLY)  # a folder's descriptor: without one Python's link() keeps the link
    try:
        for name in (path, temporary, temporary):
            try:
                os.link(str(fd), name, src_dir_fd=here, follow_symlinks=True)
                return name
            except FileExistsError:
                if name == temporary:
                    remove_leftover(temporary)
            except OSError as e:
                if e.errno not in (errno.EXDEV, errno.EPERM, errno.ENOENT, errno.EOPNOTSUPP):
                    raise OSError(e.errno, e.strerror, path) from None  # its own name is a number
                return copied(fd, temporary)
    finally:
        os.close(here)
    raise OSError(errno.EBUSY, "another process is writing this file", path)


def copied(fd, temporary):
    """Copy a nameless file, where the system lets none have a name after all, to one named `temporary`. -> the name."""
    with os.fdopen(open_named(temporary), "wb") as new, os.fdopen(os.dup(fd), "rb") as old:
        old.seek(0)
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())
    return temporary


def append(file, data):
    """Add bytes to the end of a file that was opened unbuffered; on a full disk it is as before, not half longer."""
    end = os.fstat(file.fileno()).st_size
    view = memoryview(data)
    try:
        while view:  # such a write may write less than it was given; the next one then says why
            view = view[file.write(view) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


def write_json(path, value, ours=None, **options):
    """A JSON file, whole. NaN is not JSON: ValueError."""
    with whole_file(path, ours) as f:
        json.dump(value, f, indent=1, allow_nan=False, **options)


def sync_folder(path):
    """Make the names in a folder durable, as fsync of a file does its bytes."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
