#!/bin/bash
# Every Kafka command line tool: called by a tool's usual name it runs that
# tool's class, called as kafka-run-class.sh it runs the class it is given.
set -euo pipefail

home=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
log4j=$home/config/tools-log4j2.properties
heap=-Xmx256m

case $(basename "$0") in
  kafka-broker-api-versions.sh) class=org.apache.kafka.tools.BrokerApiVersionsCommand ;;
  kafka-configs.sh)             class=kafka.admin.ConfigCommand ;;
  kafka-console-consumer.sh)    class=org.apache.kafka.tools.consumer.ConsoleConsumer ;;
  kafka-console-producer.sh)    class=org.apache.kafka.tools.ConsoleProducer ;;
  kafka-consumer-groups.sh)     class=org.apache.kafka.tools.consumer.group.ConsumerGroupCommand ;;
  kafka-delete-records.sh)      class=org.apache.kafka.tools.DeleteRecordsCommand ;;
  kafka-get-offsets.sh)         class=org.apache.kafka.tools.GetOffsetShell ;;
  kafka-server-start.sh)        class=kafka.Kafka log4j=$home/config/log4j2.properties heap=-Xmx512m ;;
  kafka-storage.sh)             class=kafka.tools.StorageTool ;;
  kafka-topics.sh)              class=org.apache.kafka.tools.TopicCommand ;;
  kafka-transactions.sh)        class=org.apache.kafka.tools.TransactionsCommand ;;
  *) class=${1:?the class to run}; shift ;;
esac

# The options are lists of words by their definition.
# shellcheck disable=SC2086
exec java ${KAFKA_HEAP_OPTS:-$heap} -XX:+UseSerialGC -XX:TieredStopAtLevel=${KAFKA_JIT_LEVEL:-4} \
  -Dlog4j2.configurationFile="$log4j" ${KAFKA_OPTS:-} -cp "$home/libs/*" "$class" "$@"
