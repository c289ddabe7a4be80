#!/usr/bin/env bash
# Stand-ins for the upstream images of the development services, built from
# Debian's packages and Kafka's libraries, for machines that cannot pull.
# They carry the upstream names, paths, users and variables as far as the
# manifests of ../ use them, so that the manifests fit both.
#
#   deploy/dev/images/build.sh [postgres|redis|kafka]...   prints an archive each
#
# Archives stay in $MEANDER_CACHE/images and are rebuilt when an input changes.
# shellcheck disable=SC2016 # hooks are expanded by the shell that runs them
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/cluster/versions.sh
. "$here/../../../tests/cluster/versions.sh"

postgres_image=docker.io/library/postgres:15
redis_image=docker.io/library/redis:7
kafka_image=docker.io/apache/kafka:$KAFKA_VERSION

# root_fs TAR PACKAGES USER UID HOME [MMDEBSTRAP OPTION...]: a minimal Debian
# with these packages, in which USER has the number that upstream gives it; a
# package that makes the user itself takes the one that is there.
root_fs() {
  local tar=$1 packages=$2 user=$3 uid=$4 home=$5; shift 5
  mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --essential-hook="echo '$user:x:$uid:' >>\"\$1\"/etc/group
      echo '$user:x:$uid:$uid::$home:/bin/sh' >>\"\$1\"/etc/passwd" \
    "$@" bookworm "$tar"
}

# image NAME ARCHIVE WORK ROOTFS FOLDER OPTION...: the root file system, over
# it the folder, as an archive that Docker, kind and containerd can load.
image() {
  local name=$1 archive=$2 work=$3 rootfs=$4 folder=$5 container; shift 5
  local buildah=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" add -q "$container" "$rootfs" /
  # As an archive, since a folder's content would all become root's.
  tar -C "$folder" --numeric-owner -cf "$work/folder.tar" .
  "${buildah[@]}" add -q "$container" "$work/folder.tar" /
  "${buildah[@]}" config "$@" "$container"
  "${buildah[@]}" commit -q "$container" "$name" >/dev/null
  "${buildah[@]}" push -q "$name" "docker-archive:$archive:$name"
}

build_postgres() {
  local archive=$1 work=$2
  local bin=/usr/lib/postgresql/15/bin
  # The server's package would create a cluster, and just-in-time compilation
  # would be half of the image.
  root_fs "$work/rootfs.tar" postgresql-15 postgres 999 /var/lib/postgresql \
    --essential-hook='mkdir -p "$1"/etc/postgresql-common "$1"/docker-entrypoint-initdb.d
      echo "create_main_cluster = false" >"$1"/etc/postgresql-common/createcluster.conf' \
    --customize-hook='rm -rf "$1"/usr/lib/*/libLLVM* "$1"/usr/lib/llvm-* "$1"/usr/lib/postgresql/15/lib/llvmjit* "$1"/usr/lib/postgresql/15/lib/bitcode
      chmod 3777 "$1"/var/run/postgresql
      install -d -m 1777 -o 999 -g 999 "$1"/var/lib/postgresql/data'
  install -D -m 755 "$here/postgres/docker-entrypoint.sh" "$work/add/usr/local/bin/docker-entrypoint.sh"
  image "$postgres_image" "$archive" "$work" "$work/rootfs.tar" "$work/add" \
    --env "PATH=$bin:/usr/local/bin:/usr/bin:/bin" --env PGDATA=/var/lib/postgresql/data --env LANG=C.UTF-8 \
    --entrypoint '["docker-entrypoint.sh"]' --cmd postgres --port 5432 --stop-signal SIGINT
}

build_redis() {
  local archive=$1 work=$2
  root_fs "$work/rootfs.tar" redis-server redis 999 /data \
    --customize-hook='install -d -o 999 -g 999 "$1"/data'
  install -D -m 755 "$here/redis/docker-entrypoint.sh" "$work/add/usr/local/bin/docker-entrypoint.sh"
  image "$redis_image" "$archive" "$work" "$work/rootfs.tar" "$work/add" \
    --env PATH=/usr/local/bin:/usr/bin:/bin --workingdir /data \
    --entrypoint '["docker-entrypoint.sh"]' --cmd redis-server --port 6379
}

build_kafka() {
  local archive=$1 work=$2
  "$MEANDER_TESTS/setup.sh" kafka >&2
  # The package links its manual pages, and fails where their folder is missing.
  root_fs "$work/rootfs.tar" openjdk-17-jre-headless appuser 1000 /home/appuser \
    --essential-hook='mkdir -p "$1"/usr/share/man/man1' \
    --customize-hook='install -d -o 1000 -g 1000 "$1"/home/appuser "$1"/var/lib/kafka/data "$1"/mnt/shared/config'
  mkdir -p "$work/add/opt" "$work/add/etc/kafka/docker"
  cp -a "$KAFKA_HOME" "$work/add/opt/kafka"
  cp "$here"/kafka/{run,server.properties,log4j2.yaml,tools-log4j2.yaml} "$work/add/etc/kafka/docker/"
  chmod 755 "$work/add/etc/kafka/docker/run"
  chown -R 1000:1000 "$work/add/opt/kafka/config"
  image "$kafka_image" "$archive" "$work" "$work/rootfs.tar" "$work/add" \
    --env PATH=/opt/kafka/bin:/usr/local/bin:/usr/bin:/bin --user appuser \
    --entrypoint '["/etc/kafka/docker/run"]' --port 9092
}

# archive_of SERVICE: where its archive lies, by what goes into it.
archive_of() {
  local inputs=("$here/$1"/*)
  [ "$1" != kafka ] || inputs+=("$MEANDER_TESTS"/cluster/kafka/*)
  echo "$MEANDER_CACHE/images/$1-$( (declare -f root_fs image "build_$1"; cat "${inputs[@]}") | digest_of -).tar"
}

build() {
  local service=$1 archive work code=0 start=$SECONDS
  archive=$(archive_of "$service")
  if [ ! -f "$archive" ]; then
    mkdir -p "$MEANDER_CACHE/images"
    work=$(mktemp -d "$MEANDER_CACHE/images/.making-XXXXXX")
    # In a shell of its own, so that what fails stops it and is still cleaned up.
    (set -e; "build_$service" "$work/image.tar" "$work" >&2) & wait $! || code=$?
    [ $code = 0 ] && mv "$work/image.tar" "$archive"
    rm -rf "$work"
    [ $code = 0 ] || die "image $service failed"
    log "image $service: $(du -m "$archive" | cut -f1) MB, $((SECONDS - start)) s"
  fi
  echo "$archive"
}

[ $# -gt 0 ] || set -- postgres redis kafka
"$MEANDER_TESTS/setup.sh" cluster >&2
for service; do
  case $service in
    postgres | redis | kafka) build "$service" ;;
    *) die "unknown image $service; there are postgres, redis, kafka" ;;
  esac
done
