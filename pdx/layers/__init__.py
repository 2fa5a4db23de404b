"""The layers of the model. Whatever computes imports them, so releases that do not fit are found here at the latest."""

from pdx.installation.versions import check

check()
