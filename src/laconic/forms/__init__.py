"""Ways of writing a tensor down, one file each: pure tensor functions."""

from laconic.forms.base import Form as Form
from laconic.forms.base import build as build
from laconic.forms.base import kinds as kinds
