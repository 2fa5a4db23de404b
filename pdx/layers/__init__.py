"""The layers of the model. Everything that computes imports them, so versions that do not fit are found here."""

from pdx.installation.versions import check

check()
