"""The timed process: one per protection and side. Imports neither aiohttp nor libvirt nor rich; blocks on nothing."""
