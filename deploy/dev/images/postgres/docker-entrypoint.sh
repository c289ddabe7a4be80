#!/bin/bash
# The part of the upstream entry point that the manifests rely on: a first
# start makes the data folder, a superuser, a database, and runs the scripts of
# /docker-entrypoint-initdb.d against a server that listens on its socket only.
set -euo pipefail

POSTGRES_USER=${POSTGRES_USER:-postgres}
POSTGRES_DB=${POSTGRES_DB:-$POSTGRES_USER}
export POSTGRES_USER POSTGRES_DB

run_script() {
  # shellcheck source=/dev/null
  case $1 in
    *.sh) if [ -x "$1" ]; then "$1"; else . "$1"; fi ;;
    *.sql) psql -v ON_ERROR_STOP=1 --no-psqlrc -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$1" ;;
  esac
}

initialise() {
  local script
  : "${POSTGRES_PASSWORD:?must be set for the first start}"
  mkdir -p "$PGDATA"
  chmod 700 "$PGDATA"
  initdb -D "$PGDATA" -U "$POSTGRES_USER" -E UTF8 --locale=C.UTF-8 \
    --auth-local=trust --auth-host=scram-sha-256 --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD")
  printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
  echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"

  pg_ctl -D "$PGDATA" -w -t 60 -o "-c listen_addresses='' $server_options" start
  [ "$POSTGRES_DB" = postgres ] || createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
  for script in /docker-entrypoint-initdb.d/*; do
    [ ! -e "$script" ] || run_script "$script"
  done
  pg_ctl -D "$PGDATA" -w -m fast stop
}

case ${1:-} in
  '' | -*) set -- postgres "$@" ;;
esac

if [ "$1" = postgres ]; then
  # PostgreSQL refuses to run as root.
  if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown -R postgres "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
  fi
  server_options=$(printf '%q ' "${@:2}")
  [ -s "$PGDATA/PG_VERSION" ] || initialise
fi
exec "$@"
