"""Giving a finished file or tree its final name, atomically."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from p2pnode.errors import OutputExists, PathError, StoreError
from p2pnode.nix.nar_restore import remove_tree
from p2pnode.store.space import write_failure

# renameat2(2), Linux 3.15; glibc 2.28.
_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP})


def place(temporary: Path, final: Path, *, replace: bool) -> None:
    """Rename `temporary`, beside `final`, to `final`.

    With `replace` what is there gives way in one step where the file system can exchange names, and is removed only
    afterwards. Raises OutputExists (something is there and not `replace`), OutputUnwritable, StoreError.
    """
    try:
        if not replace:
            if not _renameat2(temporary, final, _NOREPLACE):
                if os.path.lexists(final):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                os.rename(temporary, final)
            return
        if not os.path.lexists(final):
            os.rename(temporary, final)
        elif not _is_directory(temporary) and not _is_directory(final):
            os.replace(temporary, final)
        elif _renameat2(temporary, final, _EXCHANGE):
            remove_tree(temporary)
        else:
            _swap(temporary, final)
    except FileExistsError:
        raise OutputExists(f"{final} exists already; choose another output or pass --force") from None
    except OSError as error:
        raise write_failure(final, error) from error


def _swap(temporary: Path, final: Path) -> None:
    aside = temporary.with_name(temporary.name + "-old")
    os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException:
        os.rename(aside, final)
        raise
    remove_tree(aside)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """False if this system or file system cannot do it. Raises OSError."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def copy_file(source: int, target: int, size: int) -> None:
    """Copy `size` bytes between descriptors inside the kernel: a reflink where there are such. Raises OSError."""
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, target, size - done, done, done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED | {errno.EXDEV}:  # another disk, before Linux 5.3
                raise
            count = os.pwrite(target, os.pread(source, min(size - done, 1 << 20), done), done)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


def remove_quietly(path: Path) -> None:
    """Remove something temporary of ours; what cannot be removed must not hide the error that led here."""
    with contextlib.suppress(OSError, StoreError, PathError):
        remove_tree(path)
