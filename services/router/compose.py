"""The parts of a router process, put together."""

import uuid
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common import keys
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.instruments import router_instruments
from services.common.orphans import ExpiringLock, OrphanFinder
from services.common.request_store import RequestStore
from services.core.placement import order_of
from services.router.fleet import Fleet
from services.router.offers import Offers
from services.router.orphans import Orphanage
from services.router.place import Placer
from services.router.planners import Planners
from services.router.rescue import Rescuer
from services.router.service import RouterService
from services.router.settings import RouterSettings
from services.router.survey import Survey
from services.router.tally import Tally

__all__ = ["RouterParts", "compose"]

_LOCK_LEASE_S = 5.0  # of the one router that looks for orphans


@dataclass(frozen=True, slots=True)
class RouterParts:
    """The service, and what has to be started and stopped with it."""

    service: RouterService
    fleet: Fleet
    planners: Planners
    placer: Placer
    tally: Tally
    orphanage: Orphanage


def compose(settings: RouterSettings, catalogue: Catalogue, redis: Redis, clock: Clock) -> RouterParts:
    """The service with everything behind it, not yet started."""
    instruments = router_instruments()
    store = RequestStore(redis, clock)
    tally = Tally(redis)
    fleet = Fleet(redis, clock, order=order_of(settings.order))
    planners = Planners(settings.planners, settings.admit_timeout_ms / 1000)
    offers = Offers(planners, clock, instruments)
    placer = Placer(store=store, fleet=fleet, planners=planners, offers=offers, clock=clock, settings=settings)
    rescuer = Rescuer(store=store, fleet=fleet, placer=placer, clock=clock, max_losses=settings.max_losses)
    service = RouterService(
        placer=placer,
        rescuer=rescuer,
        survey=Survey(fleet, planners, clock),
        fleet=fleet,
        tally=tally,
        catalogue=catalogue,
        instruments=instruments,
    )
    orphanage = Orphanage(
        finder=OrphanFinder(redis),
        lock=ExpiringLock(redis, keys.ORPHAN_LOCK, uuid.uuid4().hex, _LOCK_LEASE_S),
        store=store,
        rescuer=rescuer,
        clock=clock,
        forgotten_s=settings.forgotten_s,
    )
    return RouterParts(service, fleet, planners, placer, tally, orphanage)
