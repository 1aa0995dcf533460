"""What can go wrong while a site is invited, joins, changes its key or is revoked."""

from __future__ import annotations

from fedalign.errors import FedalignError


class EnrollmentError(FedalignError):
    """An invite, key or answer is not usable; says what to do next.  Exit code 7."""

    exit_code = 7
