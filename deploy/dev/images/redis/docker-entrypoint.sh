#!/bin/sh
# Options alone, or a configuration file, mean the server.
set -e
case ${1:-} in
  '' | -* | *.conf) set -- redis-server "$@" ;;
esac
exec "$@"
