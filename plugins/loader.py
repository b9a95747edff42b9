"""Finds plugins and loads them: `load` serves every process that runs hooks.

A name with a `/` or the end `.py` is a file. Any other name is a bundled plugin, or the name of an
entry point of the group `qmqp_relay`, or a module that can be imported. Entry points that
RELAY_PLUGINS does not name follow behind the named ones, in the order of their names: to install a
package with a plugin is to use it.

What must stay true: plugins run in the order in which they are named; one that cannot be loaded
raises PluginError, which names its file and line.
"""

import difflib
import importlib
import importlib.util
import inspect
import operator
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from plugins.entries import installed_plugins, plugin_entries
from plugins.runner import HookFunction, LoadedPlugin, Plugins
from qmqp_relay import hooks, registration
from qmqp_relay.registration import PluginArgumentError, PluginArguments, Relay
from relay.log import first_line, get_logger
from relay.plugin_entries import PluginEntry
from relay.settings import Settings, SettingsError

log = get_logger(__name__)
BUNDLED = "plugins.bundled"
LIMITS = {"timeout": "HOOK_TIMEOUT", "message_timeout": "MESSAGE_HOOK_TIMEOUT"}
"""The time limits of a plugin, and the names of the numbers (seconds) by which its module sets
other defaults."""
HOOKS = ("register", *hooks.QUESTIONS, *hooks.NOTICES, *hooks.IN_WORKER)
_OURS = {__file__, registration.__file__}


class PluginError(SettingsError):
    """A plugin cannot be used. The text names it, its file and its line."""


def load(settings: Settings) -> Plugins | None:
    """Loads and registers all plugins; None without plugins. Raises PluginError."""
    entries = plugin_entries(settings)
    if not entries:
        return None
    installed = installed_plugins()
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    names = _names(entries)
    modules = [_module(entry, installed) for entry in entries]
    entries = [_with_limits(*each) for each in zip(entries, modules, strict=True)]
    # pluggy calls the plugin first that was registered last.
    for name, entry, module in reversed([*zip(names, entries, modules, strict=True)]):
        _check_hooks(manager, name, entry, module)
    functions = _functions(manager, dict(zip(names, entries, strict=True)))
    loaded = [
        _register(name, entry, module, functions, settings)
        for name, entry, module in zip(names, entries, modules, strict=True)
    ]
    del functions["register"]
    return Plugins(loaded, functions)


def _names(entries: Iterable[PluginEntry]) -> list[str]:
    """A short name for each entry, different ones."""
    names: list[str] = []
    for entry in entries:
        name = Path(entry.name).stem if _is_file(entry.name) else entry.name
        count = sum(each.partition("#")[0] == name for each in names)
        names.append(f"{name}#{count + 1}" if count else name)
    return names


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(".py")


# Loading modules


def _module(entry: PluginEntry, installed: dict[str, EntryPoint]) -> object:
    name = entry.name
    try:
        if _is_file(name):
            return _from_file(Path(name).expanduser().absolute())
        if _find(f"{BUNDLED}.{name}"):
            return _imported(f"{BUNDLED}.{name}")
        if name in installed:
            return _entry_point(installed[name])
        if _find(name):
            return _imported(name)
    except SyntaxError as error:
        raise PluginError(
            f"RELAY_PLUGINS: {name}: {error.filename}, line {error.lineno}: {error.msg}"
        ) from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"RELAY_PLUGINS: {name}: {_where(error)}{_what(error)}") from error
    known = sorted({*installed, *bundled_names()})
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {near[0]}?" if near else "a file is written with a / or .py"
    raise PluginError(f"RELAY_PLUGINS: {name}: there is no such plugin; {meant}")


def bundled_names() -> list[str]:
    """The names of the plugins that come with the relay."""
    directory = Path(__file__).parent / "bundled"
    return sorted(path.stem for path in directory.glob("[a-z]*.py"))


def _find(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _from_file(path: Path) -> ModuleType:
    """A module of its own for each entry, so that a file may be named twice."""
    number = sum(name.startswith("qmqp_relay_plugin_") for name in sys.modules) + 1
    spec = importlib.util.spec_from_file_location(f"qmqp_relay_plugin_{number}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PluginError(f"RELAY_PLUGINS: {path}: the name of a plugin's file ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _imported(name: str) -> ModuleType:
    """A module; a copy of it if it was imported before, so that each entry has its own."""
    if name not in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _entry_point(point: EntryPoint) -> object:
    module: object = _imported(point.module)
    return operator.attrgetter(point.attr)(module) if point.attr else module


# Hooks


def _with_limits(entry: PluginEntry, module: object) -> PluginEntry:
    """The entry with the time limits of its module where RELAY_PLUGINS sets none."""
    for limit, name in LIMITS.items():
        seconds = getattr(module, name, None)
        if isinstance(seconds, int | float) and limit not in entry.own_limits:
            limits: Any = {limit: float(seconds)}
            entry = entry._replace(**limits)
    return entry


def _check_hooks(
    manager: pluggy.PluginManager, name: str, entry: PluginEntry, module: object
) -> None:
    """Registers the hooks of a plugin. Raises PluginError for one that the relay does not have, or
    that wants an argument that the hook does not have."""
    try:
        manager.register(module, name)
    except pluggy.PluginValidationError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"RELAY_PLUGINS: {entry.name}: {reason}") from error
    callers = manager.get_hookcallers(module) or []
    if not callers:
        raise PluginError(
            f"RELAY_PLUGINS: {entry.name}: it has no hook: put @hookimpl before its functions"
        )
    for caller in callers:
        (implementation,) = [one for one in caller.get_hookimpls() if one.plugin is module]
        place = _place(implementation.function)
        if not caller.has_spec():
            near = difflib.get_close_matches(caller.name, HOOKS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(HOOKS)}"
            raise PluginError(
                f"RELAY_PLUGINS: {entry.name}: {place}: there is no hook {caller.name}; {meant}"
            )
        if implementation.hookwrapper or implementation.wrapper:
            raise PluginError(
                f"RELAY_PLUGINS: {entry.name}: {place}: {caller.name} is a wrapper; the relay has"
                " no wrappers"
            )
    for hook in HOOKS:
        function = getattr(module, hook, None)
        if inspect.isfunction(function) and hook not in {caller.name for caller in callers}:
            log.warning("hook without hookimpl", plugin=name, hook=hook, place=_place(function))


def _functions(
    manager: pluggy.PluginManager, entries: dict[str, PluginEntry]
) -> dict[str, tuple[HookFunction, ...]]:
    """The functions of each hook, in the order in which they run."""
    functions = {}
    for hook in HOOKS:
        caller = getattr(manager.hook, hook)
        functions[hook] = tuple(
            HookFunction(
                one.plugin_name,
                hook,
                one.function,
                one.argnames,
                entry.message_timeout if hook in hooks.WITH_CONTENT else entry.timeout,
                fail_open=entry.fail_open,
            )
            for one in reversed(caller.get_hookimpls())
            for entry in (entries[one.plugin_name],)
        )
    return functions


def _register(
    name: str,
    entry: PluginEntry,
    module: object,
    functions: dict[str, tuple[HookFunction, ...]],
    settings: Settings,
) -> LoadedPlugin:
    """Runs `register` of one plugin. Raises PluginError."""
    relay = Relay(settings.hostname, get_logger(f"plugin.{name}"))
    arguments = {"relay": relay, "args": PluginArguments(entry.words, dict(entry.options))}
    registers = [one for one in functions["register"] if one.plugin == name]
    if not registers and (entry.words or entry.options):
        raise PluginError(
            f"RELAY_PLUGINS: {entry.name}: it takes no arguments: it has no hook register"
        )
    for one in registers:
        if one.is_async:
            place = _place(one.function)
            raise PluginError(f"RELAY_PLUGINS: {entry.name}: {place}: register must be a def")
        try:
            one.function(*(arguments[argument] for argument in one.argnames))
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"RELAY_PLUGINS: {entry.name}: {_where(error)}{_what(error)}"
            ) from error
    source = getattr(module, "__file__", None) or type(module).__module__
    present = tuple(hook for hook in HOOKS if any(one.plugin == name for one in functions[hook]))
    return LoadedPlugin(name, entry, source, present, relay)


# Faults


def _place(function: object) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]
    return f"{code.co_filename}, line {code.co_firstlineno}" if code else repr(function)


def _where(error: BaseException) -> str:
    """The place in the plugin: the last one of the traceback that is not in a library of Python or
    of the relay."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename not in _OURS
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def _what(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file {error.filename}"
    if isinstance(error, SettingsError | PluginArgumentError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"
