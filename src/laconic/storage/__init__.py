"""The `.laconic` container: a Program in one entropy-coded file; `docs/format.md` states it."""

from laconic.storage.limits import Limits as Limits
from laconic.storage.programs import SizeReport as SizeReport
from laconic.storage.programs import load as load
from laconic.storage.programs import predict as predict
from laconic.storage.programs import read_header as read_header
from laconic.storage.programs import save as save
